//! A Vulkan device that imports dma-bufs, copies them and sums them.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};

use anyhow::{Context, Result};
use ash::{Device, Entry, Instance, ext, khr, vk};

const DMA_BUF: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT;
const EXTENSIONS: [&CStr; 2] = [khr::external_memory_fd::NAME, ext::external_memory_dma_buf::NAME];

/// The number of lanes that run `sum.wgsl`. Each lane computes one sum.
const LANES: u32 = 1024;
/// The number of lanes in a workgroup, as declared in `sum.wgsl`.
const WORKGROUP_LANES: u32 = 64;

/// A device that imports dma-bufs.
pub(crate) struct Gpu {
    instance: Instance,
    device: Device,
    imports: khr::external_memory_fd::Device,
    physical: vk::PhysicalDevice,
    family: u32,
    pub(crate) name: String,
}

/// A buffer and its memory. [`Gpu::release`] frees them.
pub(crate) struct Buffer {
    buffer: vk::Buffer,
    memory: vk::DeviceMemory,
    bytes: u64,
}

impl Gpu {
    /// Opens the first device that imports dma-bufs and runs compute shaders. If there is none,
    /// returns the reason.
    ///
    /// # Safety
    /// `entry` must outlive the returned value.
    pub(crate) unsafe fn open(entry: &Entry) -> Result<std::result::Result<Gpu, String>> {
        let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
        // SAFETY: the structures outlive the call.
        let instance =
            match unsafe { entry.create_instance(&vk::InstanceCreateInfo::default().application_info(&application), None) } {
                Ok(instance) => instance,
                Err(error) => return Ok(Err(format!("no Vulkan driver: {error}"))),
            };
        let mut seen = Vec::new();
        // SAFETY: the instance is alive.
        for physical in unsafe { instance.enumerate_physical_devices()? } {
            // SAFETY: the physical device belongs to this instance.
            let (properties, extensions) = unsafe {
                (instance.get_physical_device_properties(physical), instance.enumerate_device_extension_properties(physical)?)
            };
            let name = properties.device_name_as_c_str()?.to_string_lossy().into_owned();
            let has = |wanted: &CStr| extensions.iter().any(|own| own.extension_name_as_c_str() == Ok(wanted));
            if !EXTENSIONS.into_iter().all(has) {
                seen.push(format!("{name} cannot import dma-bufs"));
                continue;
            }
            // SAFETY: the physical device belongs to this instance.
            let families = unsafe { instance.get_physical_device_queue_family_properties(physical) };
            let wanted = vk::QueueFlags::COMPUTE;
            let Some(family) = families.iter().position(|family| family.queue_flags.contains(wanted)) else { continue };
            let family = u32::try_from(family)?;
            let queues = [vk::DeviceQueueCreateInfo::default().queue_family_index(family).queue_priorities(&[1.0])];
            let names = EXTENSIONS.map(CStr::as_ptr);
            let info = vk::DeviceCreateInfo::default().queue_create_infos(&queues).enabled_extension_names(&names);
            // SAFETY: the structures outlive the call.
            let device = unsafe { instance.create_device(physical, &info, None)? };
            let imports = khr::external_memory_fd::Device::new(&instance, &device);
            return Ok(Ok(Gpu { instance, device, imports, physical, family, name }));
        }
        Ok(Err(if seen.is_empty() { "no Vulkan device".to_owned() } else { seen.join("; ") }))
    }

    /// Finds a memory type that `allowed` permits and that has the `wanted` properties.
    fn find_memory_type(&self, allowed: u32, wanted: vk::MemoryPropertyFlags) -> Option<u32> {
        // SAFETY: the physical device belongs to this instance.
        let memory = unsafe { self.instance.get_physical_device_memory_properties(self.physical) };
        (0..memory.memory_type_count)
            .find(|&index| allowed & 1 << index != 0 && memory.memory_types[index as usize].property_flags.contains(wanted))
    }

    /// Imports a dma-buf as a buffer, without copying its memory.
    pub(crate) fn import(&self, dma_buf: OwnedFd, bytes: u64) -> Result<Buffer> {
        let mut fits = vk::MemoryFdPropertiesKHR::default();
        // SAFETY: the descriptor is open, the structures outlive the calls below, and a successful
        // import transfers ownership of the descriptor to Vulkan.
        unsafe {
            self.imports
                .get_memory_fd_properties(DMA_BUF, dma_buf.as_raw_fd(), &mut fits)
                .context("cannot query the dma-buf's memory types")?;
            let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(DMA_BUF);
            let usage = vk::BufferUsageFlags::TRANSFER_SRC | vk::BufferUsageFlags::STORAGE_BUFFER;
            let info = vk::BufferCreateInfo::default().size(bytes).usage(usage).push_next(&mut external);
            let buffer = self.device.create_buffer(&info, None)?;
            let needs = self.device.get_buffer_memory_requirements(buffer);
            let index = self.find_memory_type(needs.memory_type_bits & fits.memory_type_bits, vk::MemoryPropertyFlags::empty());
            let index = index.context("cannot import the dma-buf: the driver has no memory type for it")?;
            let mut import = vk::ImportMemoryFdInfoKHR::default().handle_type(DMA_BUF).fd(dma_buf.as_raw_fd());
            let allocate = vk::MemoryAllocateInfo::default().allocation_size(needs.size.max(bytes)).memory_type_index(index);
            let memory =
                self.device.allocate_memory(&allocate.push_next(&mut import), None).context("cannot import the dma-buf")?;
            // Vulkan owns the descriptor only after a successful import.
            let _owned_by_vulkan = dma_buf.into_raw_fd();
            self.device.bind_buffer_memory(buffer, memory, 0)?;
            Ok(Buffer { buffer, memory, bytes })
        }
    }

    /// Creates a buffer whose memory the CPU can map.
    fn make_visible(&self, bytes: u64, usage: vk::BufferUsageFlags) -> Result<Buffer> {
        // SAFETY: the structures outlive the calls.
        unsafe {
            let buffer = self.device.create_buffer(&vk::BufferCreateInfo::default().size(bytes).usage(usage), None)?;
            let needs = self.device.get_buffer_memory_requirements(buffer);
            let wanted = vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
            let index =
                self.find_memory_type(needs.memory_type_bits, wanted).context("cannot find memory that the CPU can map")?;
            let allocate = vk::MemoryAllocateInfo::default().allocation_size(needs.size).memory_type_index(index);
            let memory = self.device.allocate_memory(&allocate, None)?;
            self.device.bind_buffer_memory(buffer, memory, 0)?;
            Ok(Buffer { buffer, memory, bytes })
        }
    }

    /// Returns the bytes of a buffer that [`Gpu::make_visible`] created.
    fn read_bytes(&self, buffer: &Buffer) -> Result<Vec<u8>> {
        // SAFETY: the memory comes from `make_visible`, so it can be mapped and has `buffer.bytes`
        // bytes. The GPU does not write to it, because `run` has waited until the queue is idle.
        unsafe {
            let address = self.device.map_memory(buffer.memory, 0, buffer.bytes, vk::MemoryMapFlags::empty())?;
            let bytes = std::slice::from_raw_parts(address.cast::<u8>(), usize::try_from(buffer.bytes)?).to_vec();
            self.device.unmap_memory(buffer.memory);
            Ok(bytes)
        }
    }

    /// Frees a buffer and its memory. The GPU must no longer use the buffer.
    pub(crate) fn release(&self, buffer: Buffer) {
        // SAFETY: each function that uses a buffer waits until the queue is idle.
        unsafe {
            self.device.destroy_buffer(buffer.buffer, None);
            self.device.free_memory(buffer.memory, None);
        }
    }

    /// Copies a buffer on the GPU, and returns the bytes of the copy.
    pub(crate) fn copy(&self, from: &Buffer) -> Result<Vec<u8>> {
        let to = self.make_visible(from.bytes, vk::BufferUsageFlags::TRANSFER_DST)?;
        // SAFETY: both buffers have memory of `from.bytes` bytes, which is alive until `run`
        // returns.
        self.run(|commands| unsafe {
            self.device.cmd_copy_buffer(commands, from.buffer, to.buffer, &[vk::BufferCopy::default().size(from.bytes)]);
        })?;
        let bytes = self.read_bytes(&to);
        self.release(to);
        bytes
    }

    /// Sums a buffer on the GPU, with the shader `sum.wgsl`.
    pub(crate) fn sum(&self, words: &Buffer) -> Result<u32> {
        let sums = self.make_visible(u64::from(LANES) * 4, vk::BufferUsageFlags::STORAGE_BUFFER)?;
        let code = compile_shader()?;
        // SAFETY: everything made here is destroyed only after the queue is idle, and the
        // structures outlive the calls.
        unsafe {
            let kind = vk::DescriptorType::STORAGE_BUFFER;
            let bindings = [0, 1].map(|binding| {
                vk::DescriptorSetLayoutBinding::default()
                    .binding(binding)
                    .descriptor_type(kind)
                    .descriptor_count(1)
                    .stage_flags(vk::ShaderStageFlags::COMPUTE)
            });
            let set_layouts = [self
                .device
                .create_descriptor_set_layout(&vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings), None)?];
            let layout =
                self.device.create_pipeline_layout(&vk::PipelineLayoutCreateInfo::default().set_layouts(&set_layouts), None)?;
            let module = self.device.create_shader_module(&vk::ShaderModuleCreateInfo::default().code(&code), None)?;
            let stage =
                vk::PipelineShaderStageCreateInfo::default().stage(vk::ShaderStageFlags::COMPUTE).module(module).name(c"main");
            let info = vk::ComputePipelineCreateInfo::default().stage(stage).layout(layout);
            let made = self.device.create_compute_pipelines(vk::PipelineCache::null(), &[info], None);
            let pipeline = made.map_err(|(_, error)| error).context("cannot create a pipeline for the shader")?[0];

            let sizes = [vk::DescriptorPoolSize::default().ty(kind).descriptor_count(2)];
            let pool = self
                .device
                .create_descriptor_pool(&vk::DescriptorPoolCreateInfo::default().max_sets(1).pool_sizes(&sizes), None)?;
            let info = vk::DescriptorSetAllocateInfo::default().descriptor_pool(pool).set_layouts(&set_layouts);
            let sets = self.device.allocate_descriptor_sets(&info)?;
            let infos =
                [words, &sums].map(|buffer| [vk::DescriptorBufferInfo::default().buffer(buffer.buffer).range(vk::WHOLE_SIZE)]);
            let writes: Vec<_> = (0..)
                .zip(&infos)
                .map(|(binding, info)| {
                    vk::WriteDescriptorSet::default()
                        .dst_set(sets[0])
                        .dst_binding(binding)
                        .descriptor_type(kind)
                        .buffer_info(info)
                })
                .collect();
            self.device.update_descriptor_sets(&writes, &[]);

            self.run(|commands| {
                let point = vk::PipelineBindPoint::COMPUTE;
                self.device.cmd_bind_pipeline(commands, point, pipeline);
                self.device.cmd_bind_descriptor_sets(commands, point, layout, 0, &sets, &[]);
                self.device.cmd_dispatch(commands, LANES / WORKGROUP_LANES, 1, 1);
                let barrier = vk::MemoryBarrier::default()
                    .src_access_mask(vk::AccessFlags::SHADER_WRITE)
                    .dst_access_mask(vk::AccessFlags::HOST_READ);
                let (from, to) = (vk::PipelineStageFlags::COMPUTE_SHADER, vk::PipelineStageFlags::HOST);
                self.device.cmd_pipeline_barrier(commands, from, to, vk::DependencyFlags::empty(), &[barrier], &[], &[]);
            })?;
            self.device.destroy_descriptor_pool(pool, None);
            self.device.destroy_pipeline(pipeline, None);
            self.device.destroy_shader_module(module, None);
            self.device.destroy_pipeline_layout(layout, None);
            self.device.destroy_descriptor_set_layout(set_layouts[0], None);
        }
        let lanes = self.read_bytes(&sums)?;
        self.release(sums);
        let lanes = lanes.chunks_exact(4).map(|lane| u32::from_le_bytes([lane[0], lane[1], lane[2], lane[3]]));
        Ok(lanes.fold(0, u32::wrapping_add))
    }

    /// Records commands, submits them, and waits until the GPU has run them.
    fn run(&self, record: impl FnOnce(vk::CommandBuffer)) -> Result<()> {
        // SAFETY: everything made here is destroyed only after the queue is idle.
        unsafe {
            let pool =
                self.device.create_command_pool(&vk::CommandPoolCreateInfo::default().queue_family_index(self.family), None)?;
            let info = vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(1);
            let commands = self.device.allocate_command_buffers(&info)?;
            self.device.begin_command_buffer(commands[0], &vk::CommandBufferBeginInfo::default())?;
            record(commands[0]);
            self.device.end_command_buffer(commands[0])?;
            let queue = self.device.get_device_queue(self.family, 0);
            self.device.queue_submit(queue, &[vk::SubmitInfo::default().command_buffers(&commands)], vk::Fence::null())?;
            self.device.queue_wait_idle(queue)?;
            self.device.destroy_command_pool(pool, None);
            Ok(())
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: the GPU runs no commands of this device, because each function that submits some
        // waits until the queue is idle.
        unsafe {
            self.device.destroy_device(None);
            self.instance.destroy_instance(None);
        }
    }
}

/// Computes the same sum as `sum.wgsl`, but on the CPU. An incomplete last word is padded with
/// zeros.
pub(crate) fn sum(bytes: &[u8]) -> u32 {
    let word = |part: &[u8]| {
        let mut word = [0; 4];
        word[..part.len()].copy_from_slice(part);
        u32::from_le_bytes(word)
    };
    let words = (0_u32..).zip(bytes.chunks(4));
    words.fold(0_u32, |sum, (i, part)| sum.wrapping_add(word(part).wrapping_mul(i.wrapping_mul(2).wrapping_add(1))))
}

/// Compiles `sum.wgsl` to SPIR-V.
fn compile_shader() -> Result<Vec<u32>> {
    let module = naga::front::wgsl::parse_str(include_str!("sum.wgsl")).context("cannot parse the shader")?;
    let mut validator = naga::valid::Validator::new(naga::valid::ValidationFlags::all(), naga::valid::Capabilities::empty());
    let info = validator.validate(&module).context("cannot validate the shader")?;
    // Vulkan 1.1 accepts SPIR-V up to 1.3, the first version with storage buffers.
    let options = naga::back::spv::Options { lang_version: (1, 3), ..naga::back::spv::Options::default() };
    naga::back::spv::write_vec(&module, &info, &options, None).context("cannot translate the shader to SPIR-V")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sum_depends_on_the_order_of_words() {
        assert_eq!(sum(&[1, 0, 0, 0, 2, 0, 0, 0]), 1 + 3 * 2);
        assert_eq!(sum(&[2, 0, 0, 0, 1, 0, 0, 0]), 2 + 3);
        assert_eq!(sum(&[0, 0, 0, 0, 7]), 3 * 7);
    }

    #[test]
    fn shader_compiles_to_spir_v() {
        assert_eq!(compile_shader().unwrap()[0], 0x0723_0203, "SPIR-V must start with its magic number");
    }
}
