"""Audits of other people's packages: the peers of this engine, and the invertible layers of nine public packages."""
