"""Solve the layers of a smaller network, so that it computes what the large one did."""

from pocketize.calibration.calibrate import calibrate
from pocketize.calibration.options import Calibration
from pocketize.calibration.result import CalibratedLayer, CalibratedNetwork

__all__ = ["CalibratedLayer", "CalibratedNetwork", "Calibration", "calibrate"]
