from .plan import SamplingPlan as SamplingPlan
from .solvers import sample as sample
