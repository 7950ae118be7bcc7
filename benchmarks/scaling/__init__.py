# SPDX-License-Identifier: Apache-2.0
"""What a step should take, from the sizes of the models and of the card: `scaling_model.py`'s arithmetic."""
