"""The old place of ``properties.support.twin``."""

from properties.support.twin import *  # noqa: F403
