"""Tasks of images: the bundled data sets, spread over clients by `partition`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedcore.data import sources
from fedcore.data.federated import Examples, FederatedData
from fedcore.data.partition import carve
from fedcore.errors import SettingsError
from fedcore.models.image import ImageModel
from fedcore.task import Task
from fedcore.tasks.options import refuse_folder, refuse_options

if TYPE_CHECKING:
    from fedcore.config import Experiment

__all__ = ["image_model", "images"]

DEFAULT_POPULATION = 100


def images(experiment: Experiment, name: str) -> Task:
    """Classification of a bundled image data set, spread over clients by `partition`.

    Raises SettingsError for options, for a folder that has not the files, and for a
    partition or proxy set that the data does not allow.
    """
    refuse_options(experiment, name)
    if name == "digits":
        refuse_folder(experiment, "the digits come with scikit-learn")
    source = sources.load(name, experiment.data_folder)
    population = experiment.population
    if population is None and experiment.partition.name != "natural":
        population = DEFAULT_POPULATION
    train = Examples(source.x_train, source.y_train)
    test = Examples(source.x_test, source.y_test)
    labels = source.y_train.numpy()
    proxy_rows, pool = carve(labels, experiment.proxy, experiment.seed)
    groups = None if source.groups is None else source.groups[pool]
    part = experiment.partition.split(labels[pool], groups, population, experiment.seed)
    data = FederatedData(
        train,
        test,
        pool[part.order],
        part.offsets,
        experiment.holdout,
        experiment.seed,
    )
    proxy = None
    if experiment.proxy:
        proxy = Examples(train.x[proxy_rows], train.y[proxy_rows])
    shape = tuple(source.x_train.shape[1:])
    model = image_model(experiment).build(shape, source.num_classes)
    return Task(model, data, proxy=proxy, pixels=source.pixels)


def image_model(experiment: Experiment) -> ImageModel:
    """The settings of the model. Raises SettingsError for one of text."""
    settings = experiment.model
    if isinstance(settings, ImageModel):
        return settings
    raise SettingsError(
        f'model.name = "{settings.name}": it reads text, and the task '
        f'"{experiment.task}" has images; use mlp, cnn, resnet or vit, or a task of '
        "text (shakespeare, texts)"
    )
