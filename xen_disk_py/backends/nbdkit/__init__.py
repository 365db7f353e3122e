"""Python plugins of nbdkit as disks."""

from .backend import PluginBackend, is_plugin, plugin_class

__all__ = ["PluginBackend", "is_plugin", "plugin_class"]
