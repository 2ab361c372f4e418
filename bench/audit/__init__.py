"""Audits of other people's packages: engines like this one (``peers``) and invertible layers (``findings``)."""
