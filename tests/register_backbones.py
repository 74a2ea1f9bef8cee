"""Register the backbones of own_backbone.py in another process: launch.py --register=tests/register_backbones.py."""

from mtl_sparse.models.backbones import BACKBONES
from tests.own_backbone import ROWS

BACKBONES.update(ROWS)
