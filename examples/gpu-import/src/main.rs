//! Uses a model's segments as buffers of a GPU, without a copy: dma-bufs imported by Vulkan
//! (`VK_EXT_external_memory_dma_buf`). Compares what the GPU reads with the file.
//!
//! `just gpu-import MODEL`. If there is no dma-buf heap, no Vulkan, or no driver that imports
//! dma-bufs, prints the reason and exits with 0.
#![allow(unsafe_code, reason = "Vulkan")]

use std::ffi::CStr;
use std::os::fd::{AsRawFd, IntoRawFd};

use anyhow::{Context, Result, ensure};
use ash::{Device, Entry, Instance, ext, khr, vk};
use dmaload::{Error, Loader, Segment};

const DMA_BUF: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT;
const EXTENSIONS: [&CStr; 2] = [khr::external_memory_fd::NAME, ext::external_memory_dma_buf::NAME];

/// A device that imports dma-bufs.
struct Gpu {
    instance: Instance,
    device: Device,
    imports: khr::external_memory_fd::Device,
    physical: vk::PhysicalDevice,
    family: u32,
    name: String,
}

impl Gpu {
    /// Opens the first device that imports dma-bufs. If there is none, returns the reason.
    ///
    /// # Safety
    /// `entry` must outlive the returned value.
    unsafe fn open(entry: &Entry) -> Result<std::result::Result<Gpu, String>> {
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
                seen.push(format!("{name} imports no dma-bufs"));
                continue;
            }
            // SAFETY: as above.
            let families = unsafe { instance.get_physical_device_queue_family_properties(physical) };
            let transfers = vk::QueueFlags::TRANSFER | vk::QueueFlags::GRAPHICS | vk::QueueFlags::COMPUTE;
            let Some(family) = families.iter().position(|family| family.queue_flags.intersects(transfers)) else { continue };
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
    fn memory_type(&self, allowed: u32, wanted: vk::MemoryPropertyFlags) -> Option<u32> {
        // SAFETY: the physical device belongs to this instance.
        let memory = unsafe { self.instance.get_physical_device_memory_properties(self.physical) };
        (0..memory.memory_type_count)
            .find(|&index| allowed & 1 << index != 0 && memory.memory_types[index as usize].property_flags.contains(wanted))
    }

    /// Returns the bytes that the GPU reads from a segment's dma-buf.
    fn read(&self, segment: &Segment) -> Result<Vec<u8>> {
        let bytes = (segment.memory_offset() + segment.memory_bytes()) as u64;
        let fd = segment.hand_out_owned_dma_buf()?;
        let mut reported = vk::MemoryFdPropertiesKHR::default();
        // SAFETY: the descriptor is open, the structures outlive the calls below, and the import
        // transfers ownership of the descriptor to Vulkan.
        unsafe {
            self.imports
                .get_memory_fd_properties(DMA_BUF, fd.as_raw_fd(), &mut reported)
                .context("the driver does not know the dma-buf")?;
            let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(DMA_BUF);
            let info =
                vk::BufferCreateInfo::default().size(bytes).usage(vk::BufferUsageFlags::TRANSFER_SRC).push_next(&mut external);
            let imported = self.device.create_buffer(&info, None)?;
            let needs = self.device.get_buffer_memory_requirements(imported);
            let index = self.memory_type(needs.memory_type_bits & reported.memory_type_bits, vk::MemoryPropertyFlags::empty());
            let index = index.context("no memory type fits the dma-buf")?;
            let mut import = vk::ImportMemoryFdInfoKHR::default().handle_type(DMA_BUF).fd(fd.into_raw_fd());
            let allocate = vk::MemoryAllocateInfo::default().allocation_size(needs.size.max(bytes)).memory_type_index(index);
            let memory = self.device.allocate_memory(&allocate.push_next(&mut import), None).context("importing the dma-buf")?;
            self.device.bind_buffer_memory(imported, memory, 0)?;

            let info = vk::BufferCreateInfo::default().size(bytes).usage(vk::BufferUsageFlags::TRANSFER_DST);
            let seen = self.device.create_buffer(&info, None)?;
            let needs = self.device.get_buffer_memory_requirements(seen);
            let visible = vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
            let index = self.memory_type(needs.memory_type_bits, visible).context("no memory that the CPU sees")?;
            let allocate = vk::MemoryAllocateInfo::default().allocation_size(needs.size).memory_type_index(index);
            let copy = self.device.allocate_memory(&allocate, None)?;
            self.device.bind_buffer_memory(seen, copy, 0)?;

            self.copy(imported, seen, bytes)?;
            let address = self.device.map_memory(copy, 0, bytes, vk::MemoryMapFlags::empty())?;
            let start = address.cast::<u8>().add(segment.memory_offset());
            let result = std::slice::from_raw_parts(start, segment.len()).to_vec();
            self.device.destroy_buffer(imported, None);
            self.device.destroy_buffer(seen, None);
            self.device.free_memory(memory, None);
            self.device.free_memory(copy, None);
            Ok(result)
        }
    }

    /// Copies a buffer on the GPU, and waits until the copy is complete.
    ///
    /// # Safety
    /// Both buffers must have memory of at least `bytes` bytes.
    unsafe fn copy(&self, from: vk::Buffer, to: vk::Buffer, bytes: u64) -> Result<()> {
        // SAFETY: the structures outlive the calls, and the command pool is destroyed only after
        // the queue is idle.
        unsafe {
            let pool =
                self.device.create_command_pool(&vk::CommandPoolCreateInfo::default().queue_family_index(self.family), None)?;
            let info = vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(1);
            let commands = self.device.allocate_command_buffers(&info)?;
            self.device.begin_command_buffer(commands[0], &vk::CommandBufferBeginInfo::default())?;
            self.device.cmd_copy_buffer(commands[0], from, to, &[vk::BufferCopy::default().size(bytes)]);
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
        // SAFETY: the device is idle, because each read waits until its copy is complete.
        unsafe {
            self.device.destroy_device(None);
            self.instance.destroy_instance(None);
        }
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let path = std::env::args().nth(1).context("the path of a model is missing")?;
    let loader = match Loader::builder().dma_buf(true).build() {
        Ok(loader) => loader,
        Err(error @ Error::NoDmaBuf { .. }) => {
            println!("skipped: {error}");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    // SAFETY: the system's Vulkan loader is trusted.
    let entry = match unsafe { Entry::load() } {
        Ok(entry) => entry,
        Err(error) => {
            println!("skipped: no Vulkan loader: {error}");
            return Ok(());
        }
    };
    // SAFETY: `entry` outlives `gpu`, because locals are dropped in reverse order.
    let gpu = match unsafe { Gpu::open(&entry)? } {
        Ok(gpu) => gpu,
        Err(reason) => {
            println!("skipped: {reason}");
            return Ok(());
        }
    };
    let image = loader.load(&path).await?;
    let expected = std::fs::read(&path)?;
    for segment in image.segments() {
        let seen = gpu.read(segment)?;
        let range = segment.file_range();
        let range = usize::try_from(range.start)?..usize::try_from(range.end)?;
        ensure!(seen == expected[range.clone()], "the GPU sees other bytes than the file's in {range:?}");
    }
    println!("{}: {} segments imported, {} bytes as in the file", gpu.name, image.segments().len(), image.report().bytes);
    Ok(())
}
