"""The loops of two published libraries, on the work of `image_step.py`; for the benchmark only.

`torchdistill` (its box: loader, hooks, forward and backward) and `timm` (its loader, Mixup, task and
optimiser) are used as their examples use them, with the same network, images, crops and losses as the plain
loop. What is not installed is left out: pip install torchdistill timm. RepDistiller is no package, and is
not measured here. LeNet is not either: its inputs, an eye and a head pose, go into neither loop."""

import importlib.util
import logging
from itertools import count

import torch
from torch import nn
from torch.utils.data import RandomSampler, default_collate


class Mean(nn.Module):
    "Several teachers as one module, whose logits are the logarithm of their mean probability."

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x):
        return torch.stack([m(x).float().softmax(-1) for m in self.members]).mean(0).log()


_NAMES = count()  # of collate functions, which torchdistill knows by name


class Torchdistill:
    "One step of torchdistill's own training loop."

    def __init__(self, plain):
        from torchdistill.core.distillation import DistillationBox
        from torchdistill.core.training import TrainingBox
        from torchdistill.datasets.registry import register_collate_func

        logging.disable(logging.INFO)
        self.plain, recipe = plain, plain.cfg.recipe
        name = f'mixing {next(_NAMES)}'
        collate = plain.collate

        def with_extras(rows):
            return *collate([row[:2] for row in rows]), default_collate([row[2] for row in rows])

        register_collate_func(with_extras, key=name)
        loader = dict(
            dataset_id='images',
            sampler=dict(class_or_func=RandomSampler, kwargs={}),
            collate_fn=name,
            kwargs=dict(batch_size=recipe.batch, num_workers=0, drop_last=True),
        )
        optimizer = dict(lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        config = dict(
            num_epochs=1,
            train_data_loader=loader,
            optimizer=dict(key='SGD', kwargs=dict(optimizer, nesterov=True)),
            criterion=dict(key='WeightedSumLoss', kwargs=dict(sub_terms=self._terms())),
        )
        module = dict(sequential=[], forward_proc='forward_batch_only')
        rest = dict(images=plain.images), config, plain.device, [], False, 1
        if plain.teachers:
            config |= dict(student=dict(module), teacher=dict(module, requires_grad=False))
            self.box = DistillationBox(Mean(plain.teachers).eval(), plain.net, *rest)
        else:
            self.box = TrainingBox(
                plain.net, *rest[:1], dict(config, model=dict(module)), *rest[2:]
            )
        self.box.pre_epoch_process(epoch=0)
        self.batches = endless(self.box.train_data_loader)

    def _terms(self):
        "The configuration of the loss."
        if self.plain.teachers:
            ends = dict(student_module_path='.', student_module_io='output')
            ends |= dict(teacher_module_path='.', teacher_module_io='output')
            criterion = dict(key='KDLoss', kwargs=dict(ends, temperature=1.0, alpha=0.0))
            return dict(kd=dict(criterion=criterion, weight=1.0))
        output = dict(is_from_teacher=False, module_path='.', io='output')
        sides = dict(input=output, target=dict(uses_label=True))
        wrapper = dict(key='SimpleLossWrapper', kwargs=sides)
        criterion = dict(key='CrossEntropyLoss', kwargs=dict(reduction='mean'))
        return dict(ce=dict(criterion=criterion, criterion_wrapper=wrapper, weight=1.0))

    def loss(self, x, y, extra=None):
        with self.plain.amp(self.plain.cfg.precision):
            return self.box.forward_process(x, y, supp_dict=extra)

    def step(self):
        x, y, extra = next(self.batches)
        loss = self.loss(x.to(self.plain.device), y.to(self.plain.device), extra)
        self.box.post_forward_process(loss=loss)
        return loss.item()


class Timm:
    "One step of a loop of timm's parts: loader, Mixup, task, optimiser."

    def __init__(self, plain):
        from timm.data import Mixup, create_loader
        from timm.loss import SoftTargetCrossEntropy
        from timm.optim import create_optimizer_v2
        from timm.task import ClassificationTask, LogitDistillationTask

        cfg = plain.cfg
        self.plain, recipe = plain, cfg.recipe
        mixes = not cfg.method.transfer.fixed_images
        classes = cfg.data.classes
        both = dict(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=0.0)
        self.mix = Mixup(**both, num_classes=classes) if mixes else None
        criterion = SoftTargetCrossEntropy() if mixes else nn.CrossEntropyLoss()
        kw = dict(criterion=criterion, device=plain.device, verbose=False)
        if plain.teachers:
            teacher = Mean(plain.teachers).eval().requires_grad_(False)
            for network in plain.net, teacher:
                network.pretrained_cfg = dict(mean=cfg.data.mean, std=cfg.data.std)
                network.num_classes, network.in_chans = classes, 3
            weights = dict(distill_loss_weight=1.0, task_loss_weight=0.0)
            self.task = LogitDistillationTask(plain.net, teacher, **weights, **kw)
        else:
            self.task = ClassificationTask(plain.net, **kw)
        self.task.train()
        shape = 3, 32, 32
        transform = plain.images.transform
        here = dict(num_workers=0, persistent_workers=False, pin_memory=False, use_prefetcher=False)
        more = dict(is_training=True, device=plain.device, **here)
        loader = create_loader(plain.images, shape, recipe.batch, **more)
        plain.images.transform = transform  # the same crops on all sides
        self.opt = create_optimizer_v2(
            plain.net, 'sgd', recipe.lr, recipe.weight_decay, recipe.momentum
        )
        self.batches = endless(loader)

    def loss(self, x, y):
        with self.plain.amp(self.plain.cfg.precision):
            return self.task(x, y)['loss']

    def step(self):
        x, y = (t.to(self.plain.device) for t in next(self.batches))
        if self.mix:
            x, y = self.mix(x, y)
        loss = self.loss(x, y)
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        return loss.item()


def endless(loader):
    while True:
        yield from loader


LIBRARIES = dict(torchdistill=Torchdistill, timm=Timm)
INSTALLED = [name for name in LIBRARIES if importlib.util.find_spec(name)]
