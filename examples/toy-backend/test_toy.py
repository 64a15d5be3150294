from tgi_contract_tests import BackendContract


class TestToy(BackendContract):
    backend = "toy"
