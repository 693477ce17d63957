"""The pretraining methods: one file each, and one line in `METHODS`."""

from xsmae.methods.cross_scale_mae import CROSS_SCALE_MAE
from xsmae.methods.mae import MAE
from xsmae.methods.method import Method, Pictures
from xsmae.methods.sat_mae import SAT_MAE
from xsmae.methods.scale_distill import SCALE_DISTILL
from xsmae.methods.scale_mae import SCALE_MAE
from xsmae.methods.sigreg import SIGREG
from xsmae.methods.simclr import SIMCLR

__all__ = ["METHODS", "Method", "Pictures"]

METHODS = {
    "cross_scale_mae": CROSS_SCALE_MAE,
    "mae": MAE,
    "sat_mae": SAT_MAE,
    "scale_distill": SCALE_DISTILL,
    "scale_mae": SCALE_MAE,
    "sigreg": SIGREG,
    "simclr": SIMCLR,
}
