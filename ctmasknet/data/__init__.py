"""Reading, making and preparing chest CT slices."""

from ctmasknet.data.phantom import Phantom, phantom

__all__ = ["Phantom", "phantom"]
