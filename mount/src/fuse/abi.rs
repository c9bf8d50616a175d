//! The parts of the FUSE ABI that fuser does not cover.
//!
//! Owns the constants, each with its name in the kernel (`include/uapi/linux/fuse.h`). Does not know who uses them.

use std::os::fd::RawFd;

/// The device that connects a FUSE server to the kernel.
pub(crate) const DEVICE: &str = "/dev/fuse";
/// Its device number, as in `st_rdev`: major 10, minor 229 (Documentation/admin-guide/devices.txt).
pub(crate) const DEVICE_NUMBER: u64 = 10 << 8 | 229;
/// The type of the mount in the mount table.
pub(crate) const FSTYPE: &str = "fuse.kcm";
/// The smallest buffer to which the kernel delivers a request, in bytes (`FUSE_MIN_READ_BUFFER`).
pub(super) const MIN_READ_BUFFER: usize = 8192;
/// Set in the ID of a request that the kernel sends again (`FUSE_UNIQUE_RESEND`).
const UNIQUE_RESEND: u64 = 1 << 63;
/// The message that asks the kernel to send all unanswered requests again: a `struct fuse_out_header` with length
/// 16, code `FUSE_NOTIFY_RESEND` (7) and request ID 0.
pub(super) const RESEND: [u8; 16] = [16, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// The offset of `flags2` in the kernel's INIT request: after `struct fuse_in_header` (40 bytes), the two version
/// numbers, `max_readahead` and `flags` (4 bytes each).
const INIT_FLAGS2: std::ops::Range<usize> = 56..60;
/// `FUSE_HAS_RESEND` (bit 39) in `flags2`, which holds the upper 32 bits.
const HAS_RESEND: u32 = 1 << (39 - 32);

/// The ID of a request without the resend bit, and whether the kernel sends the request again.
pub(super) fn split_unique(unique: u64) -> (u64, bool) {
    (unique & !UNIQUE_RESEND, unique & UNIQUE_RESEND != 0)
}

/// Whether the kernel that sent this INIT request can send unanswered requests again (6.9 and newer).
pub(crate) fn offers_resend(init: &[u8]) -> bool {
    let flags2 = init.get(INIT_FLAGS2).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes);
    flags2.is_some_and(|flags2| flags2 & HAS_RESEND != 0)
}

/// The options of a mount for the connection that `device` opened (Documentation/filesystems/fuse.rst). Those without a value
/// are flags.
pub(crate) fn mount_options(device: RawFd) -> [(&'static str, Option<String>); 6] {
    [
        ("fd", Some(device.to_string())),
        ("rootmode", Some("40000".into())),
        ("user_id", Some("0".into())),
        ("group_id", Some("0".into())),
        ("allow_other", None),
        ("default_permissions", None),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resend_bit_is_not_part_of_the_id() {
        assert_eq!(split_unique(6), (6, false));
        assert_eq!(split_unique(6 | 1 << 63), (6, true));
    }

    #[test]
    fn resend_is_bit_39_of_the_init_flags() {
        let mut init = vec![0; 104];
        assert!(!offers_resend(&init));
        init[56..60].copy_from_slice(&(1_u32 << 7).to_ne_bytes());
        assert!(offers_resend(&init));
        assert!(!offers_resend(&init[..58]), "an INIT of an older kernel is shorter");
    }
}
