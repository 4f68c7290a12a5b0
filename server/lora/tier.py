"""Where an adapter's weights are. Plain data."""

import enum


class AdapterTier(enum.Enum):
    """Where a request found an adapter."""

    DISK = "disk"  # it had to be read
    HOST = "host"  # it was in host memory, and had to be written to a device slot
    DEVICE = "device"  # it sat in a device slot
