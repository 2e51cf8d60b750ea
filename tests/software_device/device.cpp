// A device in software, as strict as CUDA where programs go wrong: see __init__.py for what it is good for.
//
// Kernels are the CPU's and run when they are launched, on memory that is the CPU's too; what is simulated is time and
// order. Time is what the host has waited for, nothing else, so that it is the same on every machine. Each stream has a
// moment at which its queued work ends, and what it knows of other streams' work (a vector clock), which events, waits
// of streams and waits of the host pass on.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/extension.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kType, 0);

// ---- Time and order ------------------------------------------------------------------------------------------------

using Clock = std::map<c10::StreamId, uint64_t>;  // how many launches of each stream are known to come before

struct Queue {
  double idle_at = 0;  // in seconds, as `now`
  Clock seen;          // of itself: its launches so far
};

struct Moment {  // what an event holds
  c10::StreamId stream;
  double at;
  Clock seen;
};

struct Access {  // of one piece of memory
  c10::StreamId writer = -1;
  uint64_t written = 0;
  std::string what;
  Clock read;
};

struct Arrival {  // a copy to the host that nobody has waited for
  c10::StreamId stream;
  uint64_t tick;
  at::Tensor source, target;
};

std::recursive_mutex lock;  // of all that follows; recursive, as memory is given back under it
std::map<c10::StreamId, Queue> queues;
std::unordered_map<const void*, Access> memory;
std::vector<Arrival> arrivals;
Clock host;
std::map<std::string, int64_t> waits, launches;
std::vector<std::string> races;
double now = 0, kernel_seconds = 0;

thread_local c10::StreamId current_stream = 0;

struct Locked {
  std::lock_guard<std::recursive_mutex> guard{lock};
};

void join(Clock& clock, const Clock& other) {
  for (auto [stream, tick] : other) clock[stream] = std::max(clock[stream], tick);
}

bool knows(const Clock& clock, c10::StreamId stream, uint64_t tick) {
  auto found = clock.find(stream);
  return found != clock.end() && found->second >= tick;
}

struct AsCpu {  // below autograd and autocast, where the CPU's kernels are called with aliases of the device's memory
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard below_autocast{c10::autocast_dispatch_keyset};
};

// The host has waited for what `seen` says: copies of that work have arrived. Holds the lock.
void host_learns(const Clock& seen) {
  join(host, seen);
  AsCpu guard;
  auto arrived = std::stable_partition(
      arrivals.begin(), arrivals.end(), [](const Arrival& copy) { return !knows(host, copy.stream, copy.tick); });
  std::for_each(arrived, arrivals.end(), [](Arrival& copy) { copy.target.copy_(copy.source); });
  arrivals.erase(arrived, arrivals.end());
}

void host_waits(const char* kind, double until, Clock seen) {
  Locked locked;
  waits[kind]++;
  now = std::max(now, until);
  host_learns(seen);
}

void host_waits_for_stream(const char* kind, c10::StreamId stream = current_stream) {
  Queue queue;
  {
    Locked locked;
    queue = queues[stream];
  }
  host_waits(kind, queue.idle_at, queue.seen);
}

void read_or_write(Queue& queue, const std::string& name, const at::Tensor& tensor, bool writes) {
  auto data = tensor.defined() && tensor.device() == kDevice ? tensor.storage().data() : nullptr;
  if (!data) return;
  auto& access = memory[data];
  auto report = [&](c10::StreamId other, const char* did, const std::string& what) {
    races.push_back(c10::str(name, " on stream ", current_stream, writes ? " writes" : " reads", " what ", what,
                             " on stream ", other, did));
  };
  if (access.writer >= 0 && access.writer != current_stream && !knows(queue.seen, access.writer, access.written))
    report(access.writer, " wrote", access.what);
  if (writes) {
    for (auto [stream, tick] : access.read)
      if (stream != current_stream && !knows(queue.seen, stream, tick)) report(stream, " read", "work");
    access = {current_stream, queue.seen[current_stream], name, {}};
  } else {
    access.read[current_stream] = queue.seen[current_stream];
  }
}

// Puts a kernel into the current stream, after what the host has waited for; returns its number in that stream.
uint64_t launch(const std::string& name, at::TensorList reads, at::TensorList writes) {
  Locked locked;
  launches[name]++;
  auto& queue = queues[current_stream];
  join(queue.seen, host);
  auto tick = ++queue.seen[current_stream];
  if (kernel_seconds > 0) queue.idle_at = std::max(queue.idle_at, now) + kernel_seconds;
  for (const auto& tensor : reads) read_or_write(queue, name, tensor, false);
  for (const auto& tensor : writes) read_or_write(queue, name, tensor, true);
  return tick;
}

// ---- Memory --------------------------------------------------------------------------------------------------------

void forget(const void* data) {
  Locked locked;
  memory.erase(data);
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto data = bytes ? c10::GetCPUAllocator()->raw_allocate(bytes) : nullptr;
    return {data, data, &release, kDevice};
  }
  static void release(void* data) {
    if (!data) return;
    forget(data);
    c10::GetCPUAllocator()->raw_deallocate(data);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const final { default_copy_data(to, from, count); }
} device_memory;

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto data = c10::GetCPUAllocator()->raw_allocate(std::max<size_t>(bytes, 1));
    Locked locked;
    blocks[data] = bytes;
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  static void release(void* data) {
    {
      Locked locked;
      blocks.erase(data);
    }
    c10::GetCPUAllocator()->raw_deallocate(data);
  }
  static bool has(const void* data) {
    Locked locked;
    auto block = blocks.upper_bound(data);
    if (block == blocks.begin()) return false;
    --block;
    auto begin = static_cast<const char*>(block->first);
    return data == begin || static_cast<const char*>(data) < begin + block->second;
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const final { default_copy_data(to, from, count); }
  static inline std::map<const void*, size_t> blocks;
} pinned_memory;

bool on_device(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kType; }

// The same memory as a tensor of the CPU.
at::Tensor to_cpu(const at::Tensor& tensor) {
  if (!on_device(tensor)) return tensor;
  const auto& storage = tensor.storage();
  c10::DataPtr data(const_cast<void*>(storage.data()), c10::Device(c10::DeviceType::CPU));
  c10::Storage alias(
      c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), /*resizable=*/true);
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(alias), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) result._set_conj(true);
  if (tensor.is_neg()) result._set_neg(true);
  return result;
}

void release_cpu_storage(void* context) {
  auto storage = static_cast<c10::Storage*>(context);
  forget(storage->data());
  delete storage;
}

// The device's storage over the memory of a CPU tensor, which it keeps alive.
c10::Storage to_device_storage(const at::Tensor& tensor) {
  auto owner = new c10::Storage(tensor.storage());
  auto bytes = owner->nbytes();
  c10::DataPtr data(owner->mutable_data(), owner, &release_cpu_storage, kDevice);
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, std::move(data), &device_memory, /*resizable=*/true);
}

at::Tensor with_storage(c10::Storage storage, const at::Tensor& like) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), like.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) result._set_conj(true);
  if (like.is_neg()) result._set_neg(true);
  return result;
}

at::Tensor to_device(const at::Tensor& tensor) {
  return tensor.defined() ? with_storage(to_device_storage(tensor), tensor) : tensor;
}

// ---- Random numbers ------------------------------------------------------------------------------------------------

struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator cpu;  // draws
  explicit DeviceGenerator(at::Generator cpu)
      : GeneratorImpl(kDevice, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), cpu(std::move(cpu)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  DeviceGenerator* clone_impl() const override { return new DeviceGenerator(cpu.clone()); }
};

at::Generator create_generator() { return at::make_generator<DeviceGenerator>(at::detail::createCPUGenerator()); }

const at::Generator& default_generator() {
  static auto generator = create_generator();
  return generator;
}

// ---- Kernels -------------------------------------------------------------------------------------------------------

// Kernels whose result has a size that the host must know, or that the host reads.
const std::set<std::string> waiting_kernels = {
    "aten::nonzero",      "aten::masked_select", "aten::_unique2",          "aten::unique_dim", "aten::unique_consecutive",
    "aten::repeat_interleave", "aten::bincount", "aten::equal",             "aten::histc",      "aten::is_nonzero",
    "aten::multinomial",  "aten::_is_all_true",  "aten::_is_any_true"};

struct Call {  // one call of an operator, turned from the device's arguments to the CPU's and back
  const c10::OperatorHandle& op;
  std::string name = op.schema().operator_name().name;
  bool indexes = name.find("index") != std::string::npos;
  bool assigns = name == "aten::_index_put_impl_";  // by index; what reads by index has composite kernels above this
  bool is_ours = false;
  std::string stranger;               // a tensor of the CPU among them
  const char* host_wait = nullptr;
  std::vector<at::Tensor> reads, writes;
  std::vector<std::pair<at::Tensor, at::Tensor>> aliases;  // the device's and the CPU's
  bool writing = false;

  at::Tensor take(const at::Tensor& tensor, bool is_index = false) {
    if (!tensor.defined()) return tensor;
    if (!on_device(tensor)) {
      if (is_index && assigns) host_wait = "copy from host";
      if (!is_index && tensor.dim() > 0) stranger = c10::str(tensor.sizes());
      return tensor;
    }
    is_ours = true;
    bool is_mask = tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte;
    if (is_index && assigns && is_mask) host_wait = "aten::nonzero";
    (writing ? writes : reads).push_back(tensor);
    aliases.emplace_back(tensor, to_cpu(tensor));
    return aliases.back().second;
  }

  c10::IValue take(const c10::IValue& value, const c10::Argument& argument) {
    writing = argument.alias_info() && argument.alias_info()->isWrite();
    if (value.isTensor()) return take(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(take(tensor, indexes && !writing));
      return list;
    }
    if (value.isList() && argument.type()->isSubtypeOf(*c10::ListType::ofOptionalTensors())) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& element : value.toListRef())
        list.push_back(element.isNone() ? std::nullopt : std::optional<at::Tensor>(take(element.toTensor(), indexes)));
      return list;
    }
    if (value.isDevice() && value.toDevice().type() == kType) {
      is_ours = true;
      return c10::Device(c10::DeviceType::CPU);
    }
    if (*argument.type() == *c10::OptionalType::create(c10::GeneratorType::get())) {
      auto generator = value.isNone() ? default_generator() : value.toGenerator();
      if (generator.device().type() == kType) return generator.get<DeviceGenerator>()->cpu;
    }
    return value;
  }

  // An output that the CPU's kernel resized has other memory now.
  void take_over(at::Tensor& ours, const at::Tensor& cpu) {
    auto impl = ours.unsafeGetTensorImpl();
    if (cpu.storage().data() != ours.storage().data()) impl->set_storage_keep_dtype(to_device_storage(cpu));
    if (cpu.sizes() != ours.sizes() || cpu.strides() != ours.strides())
      impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
  }

  at::Tensor give(const at::Tensor& cpu) {
    if (!cpu.defined()) return cpu;
    for (auto& [ours, alias] : aliases)
      if (alias.is_same(cpu)) return ours;
    for (auto& [ours, alias] : aliases)
      if (cpu.storage().data() && cpu.storage().data() == alias.storage().data()) return with_storage(ours.storage(), cpu);
    writes.push_back(to_device(cpu));
    return writes.back();
  }

  c10::IValue give(const c10::IValue& value) {
    if (value.isTensor()) return give(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(give(tensor));
    return list;
  }
};

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call{op};
  const auto& arguments = op.schema().arguments();
  auto first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); i++) (*stack)[first + i] = call.take((*stack)[first + i], arguments[i]);
  TORCH_CHECK(!call.is_ours || call.stranger.empty(), "Expected all tensors to be on the same device, but ", call.name,
              " got a tensor of shape ", call.stranger, " on cpu beside tensors on ", kDevice);
  if (waiting_kernels.count(call.name)) call.host_wait = call.name.c_str();
  if (call.assigns && (*stack)[first + 2].toTensor().numel() == 1) call.host_wait = nullptr;  // a mask is filled
  launch(call.name, call.reads, {});
  if (call.host_wait) host_waits_for_stream(call.host_wait);
  {
    AsCpu guard;
    op.callBoxed(stack);
  }
  for (auto& [ours, alias] : call.aliases) call.take_over(ours, alias);
  for (auto i = stack->size() - op.schema().returns().size(); i < stack->size(); i++)
    (*stack)[i] = call.give((*stack)[i]);
  Locked locked;
  for (auto& tensor : call.writes) read_or_write(queues[current_stream], call.name, tensor, true);
}

void run_boxed(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) { run(op, stack); }

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &device_memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &device_memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

// As CUDA: a copy that may not block arrives in pinned memory once it is waited for; until then there is rubbish.
at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool non_blocking) {
  auto tick = launch("copy", {self}, {target});
  AsCpu guard;
  if (on_device(target)) {
    to_cpu(target).copy_(to_cpu(self));
    if (!on_device(self) && !non_blocking) host_waits_for_stream("copy from host");
  } else if (non_blocking && PinnedMemory::has(target.data_ptr())) {
    auto source = to_cpu(self).clone();
    if (target.is_non_overlapping_and_dense()) std::memset(target.data_ptr(), 0xFF, target.nbytes());
    Locked locked;
    arrivals.push_back({current_stream, tick, source, target});
  } else {
    host_waits_for_stream("copy to host");
    target.copy_(to_cpu(self));
  }
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
  target.resize_(self.sizes());
  return copy_from(self, target, false);
}

at::Scalar read_scalar(const at::Tensor& self) {
  launch("read", {self}, {});
  host_waits_for_stream("item");
  return to_cpu(self).item();
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& set_view(at::Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage) {
  auto impl = self.unsafeGetTensorImpl();
  auto count = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_contiguous({count});
  return self;
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_view(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// Memory returns to the system at once, when no kernel runs: there is nothing to keep for another stream.
void record_stream(at::Tensor&, at::Stream) {}

void check_device(const char* name, at::TensorList tensors) {
  for (const auto& tensor : tensors)
    TORCH_CHECK(!tensor.defined() || on_device(tensor), "Expected all tensors to be on the same device, but ", name,
                " got a tensor of shape ", tensor.sizes(), " on ", tensor.device(), " beside tensors on ", kDevice);
}

at::Tensor convolution(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  auto shift = bias.value_or(at::Tensor());
  check_device("aten::convolution", {input, weight, shift});
  AsCpu guard;
  auto result = to_device(at::convolution(
      to_cpu(input), to_cpu(weight), to_cpu(shift), stride, padding, dilation, transposed, output_padding, groups));
  launch("aten::convolution", {input, weight, shift}, {result});
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> mask) {
  check_device("aten::convolution_backward", {grad, input, weight});
  AsCpu guard;
  std::vector<int64_t> sizes{transposed ? weight.size(1) * groups : weight.size(0)};  // of the bias
  auto [input_grad, weight_grad, bias_grad] = at::convolution_backward(
      to_cpu(grad), to_cpu(input), to_cpu(weight), sizes, stride, padding, dilation, transposed, output_padding, groups, mask);
  auto result = std::make_tuple(to_device(input_grad), to_device(weight_grad), to_device(bias_grad));
  launch("aten::convolution_backward", {grad, input, weight},
         {std::get<0>(result), std::get<1>(result), std::get<2>(result)});
  return result;
}

// ---- Streams, events and the rest that torch asks a device for -----------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::UNSAFE, kDevice, current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getNewStream(c10::Device, int) const override {
    static std::atomic<c10::StreamId> count{0};
    return c10::Stream(c10::Stream::UNSAFE, kDevice, ++count);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return getNewStream(kDevice, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = current_stream;
    current_stream = stream.id();
    return c10::Stream(c10::Stream::UNSAFE, kDevice, before);
  }
  bool queryStream(const c10::Stream& stream) const override {
    Locked locked;
    auto& queue = queues[stream.id()];
    if (now < queue.idle_at) return false;
    host_learns(queue.seen);
    return true;
  }
  void synchronizeStream(const c10::Stream& stream) const override { host_waits_for_stream("stream", stream.id()); }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    double until = 0;
    Clock seen;
    {
      Locked locked;
      for (auto& [stream, queue] : queues) {
        until = std::max(until, queue.idle_at);
        join(seen, queue.seen);
      }
    }
    host_waits("device", until, seen);
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    Locked locked;
    auto& queue = queues[stream.id()];
    join(queue.seen, host);
    if (!*event) *event = new Moment();
    *static_cast<Moment*>(*event) = {stream.id(), std::max(now, queue.idle_at), queue.seen};
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (!event) return;
    Locked locked;
    auto& queue = queues[stream.id()];
    queue.idle_at = std::max(queue.idle_at, static_cast<Moment*>(event)->at);
    join(queue.seen, static_cast<Moment*>(event)->seen);
  }
  bool queryEvent(void* event) const override {
    if (!event) return true;
    Locked locked;
    if (now < static_cast<Moment*>(event)->at) return false;
    host_learns(static_cast<Moment*>(event)->seen);
    return true;
  }
  void synchronizeEvent(void* event) const override {
    if (event) host_waits("event", static_cast<Moment*>(event)->at, static_cast<Moment*>(event)->seen);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Moment*>(event); }
  double elapsedTime(void* start, void* end, const c10::DeviceIndex) const override {
    return (static_cast<Moment*>(end)->at - static_cast<Moment*>(start)->at) * 1e3;
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return create_generator(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return PinnedMemory::has(data); }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto impl = storage.unsafeGetStorageImpl();
    auto data = device_memory.allocate(bytes);
    if (impl->data()) std::memcpy(data.get(), impl->data(), std::min(bytes, impl->nbytes()));
    impl->set_data_ptr_noswap(std::move(data));
    impl->set_nbytes(bytes);
  }
};

std::map<std::string, int64_t> copy_locked(const std::map<std::string, int64_t>& counts) {
  Locked locked;
  return counts;
}

}  // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_boxed>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &read_scalar);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("unfold", &at::native::unfold);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_view);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("record_stream", &record_stream);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

#define LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FULL_PRECISION_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER_PRECISION)
  AT_FORALL_FP32(FULL_PRECISION)
  AT_FORALL_FP32_SET_OPT_DTYPE(FULL_PRECISION_DTYPE)
  AT_FORALL_PROMOTE(WIDEST)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(kType, &device_memory);
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("waits", [] { return copy_locked(waits); });
  m.def("launches", [] { return copy_locked(launches); });
  m.def("take_races", [] {
    Locked locked;
    return std::exchange(races, {});
  });
  m.def("now", [] {
    Locked locked;
    return now;
  });
  m.def("queue", [](double seconds, c10::StreamId stream) {
    Locked locked;
    queues[stream].idle_at = std::max(queues[stream].idle_at, now) + seconds;
  });
  m.def("set_kernel_seconds", [](double seconds) {
    Locked locked;
    return std::exchange(kernel_seconds, seconds);
  });
  m.def("generator", [] { return default_generator(); });
}
