# SPDX-License-Identifier: Apache-2.0
"""The outside world, one module a tool, format or kernel facility; it knows nothing of images and templates."""
