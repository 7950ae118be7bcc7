# SPDX-License-Identifier: Apache-2.0
"""How fast a drafter's confidence is learned: what both backends' calibrations have in common. Torch-free."""

PRIOR_INFORMATION = 20.0  # curvature that speaks for a factor of one; about ten observations of an unsure drafter
SMALLEST, LARGEST = 0.2, 3.0  # factors on the logits
#: Below this temperature a target nearly always takes its likeliest token. Trees are then those of temperature 0, as
#: logits divided by so little would make an over-confident drafter certain of a single way.
SAMPLES_FROM = 0.5
LOWEST_LOGIT = -1e4  # for tokens that cannot be drafted, whose logit is -inf
