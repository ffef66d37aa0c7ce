"""Loading a model's processor, also where torchvision is missing."""

from typing import Any, cast

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

VIDEOS = "video_processor"


def load_processor(name_or_path: str, config: PreTrainedConfig) -> ProcessorMixin:
    """The processor that stands beside a model at a path or on the Hub.

    Processors that take videos need torchvision for them. Without it this one is put together from its other parts,
    and takes pictures only.

    Args:
        config: of the model.

    Raises:
        ValueError: the processor needs a package that is missing.
    """
    kind: Any = PROCESSOR_MAPPING[type(config)]
    try:
        if is_torchvision_available() or VIDEOS not in kind.get_attributes():
            return cast(ProcessorMixin, cast(Any, AutoProcessor).from_pretrained(name_or_path))
        parts: dict[str, Any] = {
            "image_processor": cast(Any, AutoImageProcessor).from_pretrained(name_or_path, backend="pil"),
            "tokenizer": AutoTokenizer.from_pretrained(name_or_path),
            VIDEOS: None,
        }
        settings, _ = kind.get_processor_dict(name_or_path)
        ordered = [parts[name] for name in kind.get_attributes()]
        return cast(ProcessorMixin, without_videos(kind).from_args_and_dict(ordered, settings))
    except ImportError as error:
        raise ValueError(f"the processor of {name_or_path} needs a package that is missing: {error}") from error


def without_videos(kind: Any) -> Any:
    """A kind of processor that accepts None for the part that reads videos."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return (
            type(None)
            if name == VIDEOS and argument is None
            else kind.check_argument_for_proper_class(self, name, argument)
        )

    return type(kind.__name__, (kind,), {"__init__": kind.__init__, "check_argument_for_proper_class": check})
