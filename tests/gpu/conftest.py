from tests.training.conftest import process_group as process_group  # a fixture of these tests too
