"""A stand-in for a GPU: tensors that say cuda:0, refuse what CUDA refuses, and compute on the CPU.

    with FakeCuda(monkeypatch) as gpu:
        ...                      # torch.device("cuda") works; two devices in one operation do not
    gpu.waits                    # list of what made the host wait for the device, each with its line

Waits are reads of values by the host, and copies from memory that is not pinned: all blocking ones, and those
of more than 64 KB, which CUDA passes through a buffer in the order of its stream. torch's FakeTensorMode
cannot do this: its tensors have no values, which augmentations need, and its backward pass needs a driver.
"""
import traceback
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

CUDA, STAGED = torch.device("cuda", 0), 2**16
ROOT = Path(__file__).resolve().parents[1]
COPIES = {"copy_", "_to_copy", "lift_fresh", "detach"}
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "bincount"}
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_"}


class DeviceError(RuntimeError):
    """What CUDA refuses."""


class CudaTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, held, requires_grad=False):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device="cpu", requires_grad=requires_grad)
        tensor.held = held
        return tensor

    device = property(lambda self: CUDA)
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)
    get_device = lambda self: 0  # noqa: E731

    def __deepcopy__(self, memo):
        return CudaTensor(self.held.clone(), self.requires_grad)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.numpy:
            raise DeviceError("a CUDA tensor has no numpy()")
        if function is torch.Tensor.tolist:
            FakeCuda.current.wait("tolist")
            return args[0].held.tolist()
        target = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, (torch.device, str))]
        if function is torch.Tensor.cpu or function is torch.Tensor.to and target == [torch.device("cpu")]:
            return ToCPU.apply(args[0])
        if function is torch.Tensor.to and target:  # here already
            rest = [x for x in args[1:] if not isinstance(x, (torch.device, str, bool))]
            return super().__torch_function__(function, types, (args[0], *rest)) if rest else args[0]
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return FakeCuda.current.run(function, args, kwargs or {})


class ToCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        FakeCuda.current.wait("copy to the CPU")
        return x.held.clone()

    @staticmethod
    def backward(ctx, grad):
        return CudaTensor(grad)


class Indexed(TorchFunctionMode):
    """"cuda" -> "cuda:0": without a driver torch cannot ask for the current device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        index = lambda x: CUDA if isinstance(x, (str, torch.device)) and str(x) == "cuda" else x  # noqa: E731
        return function(*map(index, args), **{name: index(x) for name, x in (kwargs or {}).items()})


class FakeCuda(TorchDispatchMode):
    current = None

    def __init__(self, monkeypatch):
        super().__init__()
        self.waits, self.indexed, self.pinned = [], Indexed(), {}
        for name, value in {"is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None,
                            "set_device": None, "max_memory_allocated": 0, "manual_seed_all": None,
                            "is_bf16_supported": True}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *args, value=value, **more: value)

        class autocast(torch.autocast):  # the CPU's
            def __init__(self, device_type, *args, **more):
                super().__init__("cpu", *args, **more)
        monkeypatch.setattr(torch, "autocast", autocast)
        def enter(mode):  # inference tensors would need a version counter, which the subclass lacks
            mode.without = torch.no_grad()
            mode.without.__enter__()
        monkeypatch.setattr(torch.inference_mode, "__enter__", enter)
        monkeypatch.setattr(torch.inference_mode, "__exit__",
                            lambda mode, *error: mode.without.__exit__(*error))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: self.pin(x))
        load = torch.utils.data.DataLoader.__init__  # pins by a driver

        def init(loader, *args, pin_memory=False, collate_fn=torch.utils.data.default_collate, **more):
            def collate(items):
                batch = collate_fn(items)
                return torch.utils._pytree.tree_map(self.pin, batch) if pin_memory else batch
            load(loader, *args, collate_fn=collate, **more)
        monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", init)
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            monkeypatch.setattr(torch.optim.Optimizer, name, lambda optimizer: None, raising=False)

    def __enter__(self):
        FakeCuda.current = self
        self.indexed.__enter__()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device="cuda") is a copy then
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        super().__exit__(*error)
        self.indexed.__exit__(*error)
        FakeCuda.current = None

    def pin(self, x):
        if isinstance(x, torch.Tensor):
            x = x.clone()
            self.pinned[x.data_ptr()] = x  # kept, lest its address be used again
        return x

    def wait(self, what):
        line = [f"{frame.filename}:{frame.lineno} {frame.line}" for frame in traceback.extract_stack()
                if frame.filename.startswith(str(ROOT)) and "site-packages" not in frame.filename
                and frame.filename != __file__]
        self.waits.append(f"{what} at {line[-1].removeprefix(str(ROOT))}" if line else what)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.run(function, args, kwargs or {})

    def run(self, function, args, kwargs):
        name, leaves = function._schema.name.split("::")[1], tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, CudaTensor)]
        others = [x for x in tensors if not isinstance(x, CudaTensor)]
        device = next((x for x in leaves if isinstance(x, torch.device)), None)
        on_cuda = device.type == "cuda" if device else bool(ours)
        if torch._C._current_graph_task_id() != -1 and (ours or not others):
            on_cuda = True  # the engine makes up missing gradients on what it takes for the tensor's device
        if name in COPIES and tensors:
            to, source = (isinstance(tensors[0], CudaTensor), tensors[1]) if name == "copy_" else (
                on_cuda, tensors[0])
            free = kwargs.get("non_blocking") or len(args) > 2 and args[2]
            small = source.numel() * source.element_size() <= STAGED or source.data_ptr() in self.pinned
            if to != isinstance(source, CudaTensor) and not (free and to and small):
                self.wait("copy to the GPU" if to else "copy to the CPU")
            on_cuda = to
        elif ours and others:
            self.check(function, name, args, others)
        if name in READS and ours:
            self.wait(name)
        if name in INDEXING and ours:
            for index in args[1]:
                if index is not None and (not isinstance(index, CudaTensor) or index.dtype == torch.bool):
                    self.wait("index on the CPU, or boolean")
        generator = kwargs.get("generator")
        if generator is not None and on_cuda and generator.device.type == "cpu":
            raise DeviceError(f"{name} on the GPU takes no generator of the CPU")

        def hold(x):
            x = x.held if isinstance(x, CudaTensor) else x
            return torch.device("cpu") if isinstance(x, torch.device) else x
        with _disable_current_modes():
            result = function(*tree_map(hold, args), **{**tree_map(hold, kwargs), **(
                {"pin_memory": False} if "pin_memory" in kwargs else {})})
        return self.same_objects(function, args, kwargs, tree_map(
            lambda x: CudaTensor(x) if on_cuda and isinstance(x, torch.Tensor) else x, result))

    @staticmethod
    def check(function, name, args, others):
        """DeviceError unless the CPU's tensors are numbers of a pointwise operation, or indices."""
        if name in INDEXING and isinstance(args[0], CudaTensor):
            others = [] if name == "index" or isinstance(args[2], CudaTensor) else [args[2]]
        elif not (torch.Tag.pointwise in function.tags or name.startswith(("_foreach_", "where"))):
            raise DeviceError(f"{function}: tensors on cuda:0 and cpu")
        to_cpu = name[-1] == "_" and not isinstance(tree_leaves(args)[0], CudaTensor)
        if to_cpu or any(x.dim() for x in others):
            raise DeviceError(f"{function}: tensors on cuda:0 and cpu")

    @staticmethod
    def same_objects(function, args, kwargs, result):
        """The result; where an argument was written to, that argument itself."""
        written, returns = {}, function._schema.returns
        for place, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                written.update(dict.fromkeys(argument.alias_info.before_set, value))
        if not written or result is None:
            return result
        results = result if len(returns) > 1 else (result,)
        results = tuple(written.get(next(iter(r.alias_info.before_set), None), x) if r.alias_info else x
                        for r, x in zip(returns, results))
        return results if len(returns) > 1 else results[0]
