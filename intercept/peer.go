// Who is at the other end.

package intercept

import (
	"fmt"
	"net"
	"syscall"
)

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
