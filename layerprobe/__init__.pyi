from .analyses.front import Model as Model
from .analyses.front import ProbeEvery as ProbeEvery
from .analyses.front import Run as Run
from .analyses.front import analyze as analyze
from .analyses.front import compare as compare
from .analyses.front import open as open
from .analyses.front import probe as probe

__version__: str
