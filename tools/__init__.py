# SPDX-License-Identifier: Apache-2.0
"""What the demo, the functional tests and the benchmarks share: a real guest and a libvirtd to run it."""
