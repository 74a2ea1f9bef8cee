"""Conventions for labels that data sets and tasks share."""

VOID = 255  # class or attribute label of what is not labeled; ignored in every loss and metric
