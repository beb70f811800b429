//! The C library's allocator, set for a program that makes and drops large tensors all the time.

/// Keeps freed memory in the process. By default glibc gives every large block back to the system at once, and each new tensor
/// pays for its pages again.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "mallopt is a C function; it takes two numbers and touches only the allocator's settings")]
pub fn keep_freed_memory() {
    unsafe extern "C" {
        fn mallopt(parameter: i32, value: i32) -> i32;
    }
    const M_TRIM_THRESHOLD: i32 = -1;
    const M_MMAP_MAX: i32 = -4;
    // Of the trimming threshold, −1 means never: a number would be at most 2 GiB, and a step frees more than that at once.
    // What it answers does not matter: without the settings the program is slower, nothing else.
    let _ = unsafe { (mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1)) };
}

/// Other allocators are left as they are.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_freed_memory() {}
