"""What a task is: its spec, labels, loss, activation and metrics.

A task of your own: `TASKS["mine"] = lambda config: Task(...)`, and its name in config.tasks.
"""

from mtl_sparse.tasks.registry import TASKS, Task, resolve

__all__ = ["TASKS", "Task", "resolve"]
