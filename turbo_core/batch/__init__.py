"""Many videos from a list of jobs: read, made one after the other or by several processes, resumed where it ended."""

from .jobs import Job, read_jobs
from .manifest import Manifest

__all__ = ["Job", "Manifest", "read_jobs"]
