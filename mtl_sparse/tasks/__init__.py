"""What a task is: its spec, labels, loss, activation and metrics.

To add a task, register its spec, `TASKS["mine"] = lambda config: Task(...)`, and put its name in config.tasks.
"""

from mtl_sparse.tasks.registry import TASKS, Task, resolve

__all__ = ["TASKS", "Task", "resolve"]
