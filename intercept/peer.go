// The other end: who it is, and how much is on its way there.

package intercept

import (
	"fmt"
	"net"
	"syscall"
)

// sendBuffer is the room in the kernel for replies on a unix socket, in bytes;
// the kernel doubles it. With the default, 208 KiB, large reads need a third more
// CPU time: the writer often has to wait and be woken. TCP sizes its buffers itself.
const sendBuffer = 1 << 20

// widen gives conn that room, or as much of it as we are allowed.
func widen(conn net.Conn) {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUFFORCE, sendBuffer)
	})
	if err != nil {
		u.SetWriteBuffer(sendBuffer)
	}
}

// describePeer says for people who conn's client is: the address, or the
// process behind a unix socket.
func describePeer(conn net.Conn) string {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return conn.RemoteAddr().String()
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return "unix"
	}
	var cred *syscall.Ucred
	raw.Control(func(fd uintptr) {
		cred, err = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err != nil || cred == nil {
		return "unix"
	}
	return fmt.Sprintf("pid %d uid %d", cred.Pid, cred.Uid)
}
