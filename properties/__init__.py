"""The tests, and the commands that test the tests."""

from memcnn import needs

needs.check()
