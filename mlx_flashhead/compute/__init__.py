"""Devices, tables of rows, and large products."""
