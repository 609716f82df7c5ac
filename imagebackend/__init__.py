# SPDX-License-Identifier: Apache-2.0
"""From a template image to a guest's disk, whatever the storage underneath."""
