// A pretend CUDA device: tensors are on "cuda:0", and the CPU computes them. It needs torch's CUDA build, which has the
// operators' CUDA registrations and torch.cuda, and neither a GPU nor the CUDA toolkit.
//
// Every kernel that torch registers for CUDA is replaced by one boxed function, which makes CPU tensors over the same
// memory, calls the operator on them, and hands the results back as CUDA tensors. It refuses what a GPU refuses: CPU
// tensors among CUDA tensors, and the other device's generator. Above the kernels all is torch's: views, autograd,
// autocast, composite operators.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <set>
#include <string>

namespace {

using at::Tensor;
using c10::Device;
using c10::DispatchKey;
using c10::IValue;
using c10::Storage;

const Device CUDA(c10::kCUDA, 0);

// --- memory: a CUDA storage holds the CPU storage with its numbers ---------------------------------------------------

std::atomic<int64_t> bytes_in_use{0}, peak_bytes{0};

struct Holder {
  Storage cpu;
  int64_t bytes;
};

void release(void* context) {
  auto* holder = static_cast<Holder*>(context);
  bytes_in_use -= holder->bytes;
  delete holder;
}

c10::DataPtr hold(Storage cpu) {
  void* data = cpu.mutable_data();
  const auto bytes = static_cast<int64_t>(cpu.nbytes());
  const int64_t now = bytes_in_use += bytes;
  for (auto peak = peak_bytes.load(); now > peak && !peak_bytes.compare_exchange_weak(peak, now);) {
  }
  return {data, new Holder{std::move(cpu), bytes}, &release, CUDA};
}

Storage new_cpu_storage(size_t bytes) {
  return Storage(Storage::use_byte_size_t(), bytes, at::getCPUAllocator(), /*resizable=*/true);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return hold(new_cpu_storage(bytes)); }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Allocator allocator;

const Storage& cpu_storage(const Storage& cuda) {
  const auto& data = cuda.data_ptr();
  TORCH_CHECK(data.get_deleter() == &release, "pretend device: this storage was not allocated by the pretend device");
  return static_cast<Holder*>(data.get_context())->cpu;
}

Storage new_cuda_storage(const Storage& cpu) {
  return Storage(Storage::use_byte_size_t(), cpu.nbytes(), hold(cpu), &allocator, /*resizable=*/true);
}

// --- tensors: the same shape, strides and layout on the other side ---------------------------------------------------

bool is_strided(const Tensor& t) { return t.layout() == c10::kStrided && !t.is_quantized() && t.has_storage(); }

// A strided tensor like `like` on the given storage.
Tensor on_storage(Storage storage, const Tensor& like, DispatchKey key) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) result._set_conj(true);
  if (like.is_neg()) result._set_neg(true);
  return result;
}

// A sparse tensor is the tensors it consists of, each of them moved.
template <typename Move>
Tensor move_sparse(const Tensor& t, Device device, Move move) {
  const auto options = t.options().device(device);
  if (t.layout() == c10::kSparse)
    return at::_sparse_coo_tensor_unsafe(move(t._indices()), move(t._values()), t.sizes(), options)
        ._coalesced_(t.is_coalesced());
  TORCH_CHECK_NOT_IMPLEMENTED(t.layout() == c10::kSparseCsr || t.layout() == c10::kSparseBsr,
      "pretend device: it has no ", t.is_quantized() ? "quantized tensors" : "tensors of this layout");
  return at::_sparse_compressed_tensor_unsafe(
      move(t.crow_indices()), move(t.col_indices()), move(t.values()), t.sizes(), options);
}

Tensor to_cpu(const Tensor& t) {
  if (is_strided(t)) return on_storage(cpu_storage(t.storage()), t, DispatchKey::CPU);
  return move_sparse(t, c10::kCPU, to_cpu);
}

Tensor to_cuda(const Tensor& t) {
  if (!t.defined() || t.is_cuda()) return t;
  if (is_strided(t)) return on_storage(new_cuda_storage(t.storage()), t, DispatchKey::CUDA);
  return move_sparse(t, CUDA, to_cuda);
}

// --- generators: the CPU's, from another seed, since a GPU draws other numbers than the CPU --------------------------

constexpr uint64_t OTHER_SEED = 0x5bd1e995;

struct Generator final : c10::GeneratorImpl {
  at::Generator cpu;

  explicit Generator(at::Generator of_the_cpu)
      : c10::GeneratorImpl(CUDA, c10::DispatchKeySet(DispatchKey::CUDA)), cpu(std::move(of_the_cpu)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed ^ OTHER_SEED); }
  uint64_t current_seed() const override { return cpu.current_seed() ^ OTHER_SEED; }
  uint64_t seed() override { return cpu.seed() ^ OTHER_SEED; }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(cpu.clone()); }
};

at::Generator new_generator() {
  return at::make_generator<Generator>(at::detail::createCPUGenerator(c10::default_rng_seed_val ^ OTHER_SEED));
}

at::Generator& default_generator() {
  static at::Generator generator = new_generator();
  return generator;
}

// --- operators -------------------------------------------------------------------------------------------------------

using Names = std::set<std::string>;

// Operators that take a CPU tensor without dimensions among CUDA tensors, as a number; given by Python.
Names take_cpu_scalars;

const Names TAKE_CPU_INDICES = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_",
    "aten::_unsafe_index", "aten::_unsafe_index_put"};
const Names COPY_BETWEEN_DEVICES = {"aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize"};

std::string full_name(const c10::OperatorName& name) {
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

// A call of an operator: its arguments go to the CPU, and its results come back.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack& stack)
      : op(op), schema(op.schema()), stack(stack), copies(COPY_BETWEEN_DEVICES.count(schema.name()) > 0) {}

  void run() {
    const size_t first = stack.size() - schema.arguments().size();
    for (size_t i = 0; i < schema.arguments().size(); ++i) take(stack[first + i], schema.arguments()[i]);
    refuse_other_devices();
    call_on_cpu();
    for (auto& argument : on_both) follow_resize(argument);
    for (size_t i = stack.size() - schema.returns().size(); i < stack.size(); ++i) give_back(stack[i]);
  }

  bool in_float64() const {
    for (const auto& argument : on_both)
      if (argument.cuda.scalar_type() == c10::kDouble && argument.cuda.dim() > 0) return true;
    return false;
  }

 private:
  // Autograd and autocast have had their turn, for the device.
  void call_on_cpu() const {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    op.callBoxed(&stack);
  }

  struct OnBoth {
    Tensor cuda, cpu;
  };

  void take(IValue& value, const c10::Argument& argument) {
    if (value.isTensor()) {
      value = take_tensor(value.toTensor(), argument);
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(take_tensor(t, argument));
      value = std::move(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& t : value.toOptionalTensorVector())
        list.push_back(t ? std::make_optional(take_tensor(*t, argument)) : std::nullopt);
      value = std::move(list);
    } else if (value.isDevice()) {
      result_on_cpu = value.toDevice().is_cpu();
      value = Device(c10::kCPU);
    } else if (value.isGenerator()) {
      value = take_generator(value.toGenerator());
    } else if (value.isNone() && argument.name() == "generator") {
      value = take_generator(default_generator());
    }
  }

  Tensor take_tensor(const Tensor& t, const c10::Argument& argument) {
    if (!t.defined()) return t;
    if (t.is_cuda()) {
      for (const auto& known : on_both)
        if (known.cuda.is_same(t)) return known.cpu;
      on_both.push_back({t, to_cpu(t)});
      return on_both.back().cpu;
    }
    if (!may_be_on_cpu(t, argument) && on_cpu.empty()) on_cpu = argument.name();
    return t;
  }

  bool may_be_on_cpu(const Tensor& t, const c10::Argument& argument) const {
    if (copies) return true;
    if (argument.name() == "indices" && TAKE_CPU_INDICES.count(schema.name())) return true;
    if (t.dim() > 0 || (argument.alias_info() && argument.alias_info()->isWrite())) return false;
    return t.unsafeGetTensorImpl()->is_wrapped_number() || take_cpu_scalars.count(full_name(schema.operator_name()));
  }

  at::Generator take_generator(const at::Generator& generator) const {
    auto* cuda = dynamic_cast<Generator*>(generator.unsafeGetGeneratorImpl());
    TORCH_CHECK(cuda, "Expected a 'cuda' device type for generator but found 'cpu'");
    return cuda->cpu;
  }

  // Without a CUDA tensor it is a CUDA generator that brings CPU tensors here.
  void refuse_other_devices() const {
    if (on_cpu.empty()) return;
    TORCH_CHECK(!on_both.empty(), "Expected a 'cpu' device type for generator but found 'cuda'");
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but got ", on_cpu,
        " is on cpu, different from other tensors on cuda:0 (when checking argument in method wrapper_CUDA_",
        full_name(schema.operator_name()), ")");
  }

  // An operator that writes into an argument may have given it another size and more memory.
  void follow_resize(OnBoth& argument) const {
    auto& [cuda, cpu] = argument;
    if (!is_strided(cpu) || !is_strided(cuda)) return;
    auto storage = cuda.storage();
    if (cpu.storage().data() != storage.data() || cpu.storage().nbytes() != storage.nbytes()) {
      storage.set_data_ptr_noswap(hold(cpu.storage()));
      storage.set_nbytes(cpu.storage().nbytes());
    }
    if (cpu.sizes() != cuda.sizes() || cpu.strides() != cuda.strides() || cpu.storage_offset() != cuda.storage_offset())
      cuda.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
  }

  void give_back(IValue& value) const {
    if (value.isTensor()) {
      value = give_back_tensor(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(give_back_tensor(t));
      value = std::move(list);
    }
  }

  Tensor give_back_tensor(const Tensor& t) const {
    if (!t.defined()) return t;
    for (const auto& argument : on_both) {
      if (argument.cpu.is_same(t)) return argument.cuda;
      if (is_strided(t) && is_strided(argument.cpu) && t.storage().is_alias_of(argument.cpu.storage()))
        return on_storage(argument.cuda.storage(), t, DispatchKey::CUDA);
    }
    return result_on_cpu || copies ? t : to_cuda(t);
  }

  const c10::OperatorHandle& op;
  const c10::FunctionSchema& schema;
  torch::jit::Stack& stack;
  const bool copies;
  bool result_on_cpu = false;
  std::vector<OnBoth> on_both;  // the arguments that are CUDA tensors
  std::string on_cpu;           // the first argument that is on the CPU and may not be
};

std::atomic<int64_t> calls{0}, calls_in_float64{0};  // of operators that compute

void compute_on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Call call(op, *stack);
  call.run();
  ++calls;
  if (call.in_float64()) ++calls_in_float64;
}

Tensor empty(c10::SymIntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const auto options = at::TensorOptions().dtype(dtype).device(c10::kCPU);
  return to_cuda(at::empty(C10_AS_INTARRAYREF_SLOW(size), options, format));
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>, std::optional<Device>, std::optional<bool>) {
  const auto options = at::TensorOptions().dtype(dtype).device(c10::kCPU);
  return to_cuda(at::empty_strided(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), options));
}

// --- the device, as torch asks about it ------------------------------------------------------------------------------

// There is one device and one stream, on which all work is done as soon as it is given.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, CUDA); }
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device) const override { return CUDA; }
  Device getDevice() const override { return CUDA; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(Device) const override { return stream(); }
  c10::Stream getDefaultStream(Device) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(Device, bool) const override { return stream(); }
  c10::Stream getNewStream(Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return at::getCPUAllocator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return new_generator(); }
  long versionCuDNN() const override { return 90000; }
  long versionRuntimeCuDNN() const override { return 90000; }
  long versionCUDART() const override { return 13000; }
  std::string showConfig() const override { return "pretend device"; }
};

// torch makes its hooks, which ask the driver, while it is imported, and keeps them for good. An object without data
// becomes one of another class of the same interface when it gets that class's table of virtual functions.
void replace_hooks() {
  static Hooks hooks;
  auto& of_torch = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  std::memcpy(static_cast<void*>(&of_torch), static_cast<void*>(&hooks), sizeof(void*));
}

// --- installation ----------------------------------------------------------------------------------------------------

// What keeps torch's CUDA kernel: it does nothing but give a tensor a storage or a stream.
const Names OF_TORCH = {"aten::set_", "aten::set_.source_Storage", "aten::set_.source_Storage_storage_offset",
    "aten::set_.source_Tensor", "aten::record_stream"};
// What is composed of other operators on all devices, with a choice by device inside; the CPU is to choose for itself.
const Names COMPOSED = {"aten::convolution", "aten::convolution_backward", "aten::convolution_overrideable",
    "aten::convolution_backward_overrideable", "aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize"};
const Names SPARSE = {"aten::mm", "aten::mm.out", "aten::addmm", "aten::addmm.out", "aten::bmm", "aten::addmv.out",
    "aten::_to_dense", "aten::_coalesce", "aten::mul.Tensor", "aten::add.Tensor"};

bool returns_view(const c10::FunctionSchema& schema) {
  for (const auto& result : schema.returns())
    if (result.alias_info() && !result.alias_info()->isWrite()) return true;
  return false;
}

// The operators with a CUDA kernel that computes. Views only describe memory, and keep torch's.
Names operators_to_replace() {
  auto& dispatcher = c10::Dispatcher::singleton();
  Names names = COMPOSED;
  for (const auto& name : dispatcher.getRegistrationsForDispatchKey(DispatchKey::CUDA)) {
    const auto op = dispatcher.findSchema(name);
    if (op && name.name.rfind("aten::", 0) == 0 && !returns_view(op->schema())) names.insert(full_name(name));
  }
  for (const auto& name : OF_TORCH) names.erase(name);
  names.erase("aten::empty.memory_format");
  names.erase("aten::empty_strided");
  return names;
}

torch::Library& kernels(DispatchKey key) {  // never deleted: the kernels stay until the process ends
  return *new torch::Library(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
}

void replace(torch::Library& library, const Names& names) {
  for (const auto& name : names)
    library.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&compute_on_cpu>());
}

int64_t install(const c10::List<std::string>& names_with_cpu_scalars) {
  for (const auto& name : names_with_cpu_scalars.vec()) take_cpu_scalars.insert(name);
  c10::SetAllocator(c10::kCUDA, &allocator, /*priority=*/255);
  static Guard guard;
  c10::impl::registerDeviceGuard(c10::kCUDA, &guard);
  replace_hooks();
  const Names names = operators_to_replace();
  auto& cuda = kernels(DispatchKey::CUDA);
  replace(cuda, names);
  cuda.impl("empty.memory_format", TORCH_FN(empty));
  cuda.impl("empty_strided", TORCH_FN(empty_strided));
  replace(kernels(DispatchKey::SparseCUDA), SPARSE);
  replace(kernels(DispatchKey::SparseCsrCUDA), SPARSE);
  return static_cast<int64_t>(names.size());
}

}  // namespace

TORCH_LIBRARY(pretend, library) {
  library.def("install(str[] names) -> int", [](c10::List<std::string> names) { return install(names); });
  library.def("default_generator() -> Generator?", [] { return default_generator(); });
  library.def("calls() -> int", [] { return calls.load(); });
  library.def("calls_in_float64() -> int", [] { return calls_in_float64.load(); });
  library.def("bytes_in_use() -> int", [] { return bytes_in_use.load(); });
  library.def("peak_bytes() -> int", [] { return peak_bytes.load(); });
  library.def("reset_peak_bytes() -> ()", [] { peak_bytes = bytes_in_use.load(); });
}
