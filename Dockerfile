# ctmasknet on a CPU:
#   docker build -t ctmasknet .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" ctmasknet predict slice.png -o out
FROM python:3.12-slim
COPY pyproject.toml README.md LICENSE NOTICE /src/
COPY ctmasknet /src/ctmasknet
# torch for CPUs; the default one brings gigabytes of CUDA along.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu "/src[dicom]" \
    && rm -r /src
# Whoever the container runs as, weights fetched from the Hub have a place.
ENV HF_HOME=/tmp/huggingface
USER 1000
WORKDIR /work
ENTRYPOINT ["ctmasknet"]
CMD ["--help"]
