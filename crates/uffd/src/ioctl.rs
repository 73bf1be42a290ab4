//! The ioctls this crate issues itself, typed. Numbers and structures are `userfaultfd-sys`'s.

use userfaultfd_sys as sys;

macro_rules! ioctls {
    ($($(#[$doc:meta])* $name:ident = $number:ident($type:ident);)*) => {
        $(nix::ioctl_readwrite_bad!($(#[$doc])* $name, sys::$number, sys::$type);)*
    };
}

ioctls! {
    /// `UFFDIO_API`
    api = UFFDIO_API(uffdio_api);
    /// `UFFDIO_REGISTER`
    register = UFFDIO_REGISTER(uffdio_register);
    /// `UFFDIO_COPY`
    copy = UFFDIO_COPY(uffdio_copy);
    /// `UFFDIO_ZEROPAGE`
    zeropage = UFFDIO_ZEROPAGE(uffdio_zeropage);
    /// `UFFDIO_POISON`
    poison = UFFDIO_POISON(uffdio_poison);
    /// `UFFDIO_MOVE`
    move_pages = UFFDIO_MOVE(uffdio_move);
    /// `UFFDIO_CONTINUE`
    continue_pages = UFFDIO_CONTINUE(uffdio_continue);
    /// `UFFDIO_WRITEPROTECT`
    write_protect = UFFDIO_WRITEPROTECT(uffdio_writeprotect);
    /// `UFFDIO_WAKE`
    wake = UFFDIO_WAKE(uffdio_range);
    /// `UFFDIO_UNREGISTER`
    unregister = UFFDIO_UNREGISTER(uffdio_range);
}
