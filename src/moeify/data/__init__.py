"""Text, labelled text and images from files, folders, the Hub and Python itself, as windows and batches."""

from .batches import class_ids as class_ids
from .batches import image_batches as image_batches
from .batches import lm_batches as lm_batches
from .batches import padded_text_batches as padded_text_batches
from .batches import padding_id as padding_id
from .batches import seq2seq_batches as seq2seq_batches
from .config import DataConfig as DataConfig
from .read import Example as Example
from .read import check_source as check_source
from .read import read_examples as read_examples
from .read import read_images as read_images
from .read import read_labels as read_labels
from .read import read_texts as read_texts
from .sources import is_validation as is_validation
from .tokens import ByteTokenizer as ByteTokenizer
from .tokens import Tokenizer as Tokenizer
from .tokens import TooShortError as TooShortError
from .tokens import special_ids as special_ids
from .tokens import text_pieces as text_pieces
from .tokens import text_windows as text_windows
from .tokens import token_windows as token_windows
from .training import AugmentConfig as AugmentConfig
from .training import LabelledImageData as LabelledImageData
from .training import LabelledTextData as LabelledTextData
from .training import MaskedData as MaskedData
from .training import WindowData as WindowData
