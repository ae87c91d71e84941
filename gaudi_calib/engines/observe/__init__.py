"""What both engines share: magnitudes, attention, the FP8 cast, and the nodes made of what was seen."""
