from pathlib import Path

import pytest
import yaml

import stages

CONFIGS = sorted((Path(stages.__file__).parents[1] / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_the_configuration_and_leaves_the_precision_to_the_stages(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))  # an unknown key is an error
    assert config.mixed_precision == "no"
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    known = {option.dest for option in launch_command_parser()._actions}
    assert set(config.fsdp_config) <= known
