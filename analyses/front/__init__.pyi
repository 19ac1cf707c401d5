from .analyzing import analyze as analyze
from .comparing import compare as compare
from .model import Model as Model
from .model import open as open
from .pair_matrix import PairMatrix as PairMatrix
from .probe_every import ProbeEvery as ProbeEvery
from .probing import probe as probe
from .run import Run as Run
