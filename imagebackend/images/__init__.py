# SPDX-License-Identifier: Apache-2.0
"""The contract, and a module for each backend that fulfils it."""
