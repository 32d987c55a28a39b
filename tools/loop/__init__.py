"""Annotations to a better model in production.

annotations -> added to the data set -> pushed -> pipeline: trained from the live weights, compared, gated, promoted
"""
