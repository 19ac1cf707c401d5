from .alignment import Projectors as Projectors
from .alignment import mean_cosine as mean_cosine
from .loss import LayerSync as LayerSync
from .loss import unwrapped as unwrapped
from .options import WEIGHT as WEIGHT
from .options import SyncOptions as SyncOptions
from .pair import LayerPair as LayerPair
from .pair import layer_of_depth as layer_of_depth
