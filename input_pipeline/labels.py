"""Conventions of labels that data sets and tasks share."""

VOID = 255  # class or attribute label of what is not labeled; counted in no loss and no metric
