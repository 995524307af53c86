"""Worker processes that stop with the process that started them."""

import os
import threading
from multiprocessing import parent_process


def stop_with_parent() -> None:
    """Called once in a worker: when its parent is gone, even killed, the worker ends at once."""
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)  # children of the worker, such as kernels, watch it and follow
