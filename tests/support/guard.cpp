// A device guard for CUDA that does nothing, so that a CPU build of torch accepts tensors that say "cuda:0".
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using c10::Device;
using c10::DeviceType;

struct PretendGuard final : public c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

PretendGuard guard;

auto& slot() { return c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)]; }
}  // namespace

extern "C" void install() { slot().store(&guard); }
extern "C" void uninstall() { slot().store(nullptr); }
