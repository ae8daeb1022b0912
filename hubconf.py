"""torch.hub entry points: the 14 variants. `torch.hub.help(REPO, NAME)` describes each."""

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors", "numpy", "PIL", "tqdm"]

from ctmasknet.zoo import (  # noqa: E402, F401
    ctmasknet_resnet18,
    ctmasknet_resnet18_t1,
    ctmasknet_resnet18_t2,
    ctmasknet_resnet34,
    ctmasknet_resnet34_t1,
    ctmasknet_resnet34_t2,
    ctmasknet_resnet50,
    maskrcnn_resnet18,
    maskrcnn_resnet18_t1,
    maskrcnn_resnet18_t2,
    maskrcnn_resnet34,
    maskrcnn_resnet34_t1,
    maskrcnn_resnet34_t2,
    maskrcnn_resnet50,
)
