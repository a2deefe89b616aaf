// The mount itself: a connection to the kernel, by mount(2) or by fusermount3.

package fusefs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// fsName is the source that the mount table shows.
const fsName = "blksnap"

// attach mounts a new connection on dir and returns its file descriptor, on
// which the kernel sends requests. Where we are not privileged fusermount3 does
// it for us.
func attach(ctx context.Context, dir string, allowOther bool) (int, error) {
	options := fmt.Sprintf("max_read=%d", maxIO)
	if allowOther {
		options += ",allow_other,default_permissions"
	}
	if os.Geteuid() == 0 {
		return attachDirect(dir, options)
	}
	return attachByHelper(ctx, dir, options)
}

func attachDirect(dir, options string) (int, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open /dev/fuse: %w", err)
	}
	options = fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,%s", fd, unix.S_IFDIR, os.Geteuid(), os.Getegid(), options)
	if err := unix.Mount(fsName, dir, fsType, unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// attachByHelper has fusermount3 mount. It sends the file descriptor over a
// socket; what it has to complain about is in the error.
func attachByHelper(ctx context.Context, dir, options string) (int, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("make a socket for fusermount3: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "fusermount3"), os.NewFile(uintptr(pair[1]), "fusermount3")
	defer ours.Close()
	defer theirs.Close()
	options = "fsname=" + fsName + ",subtype=" + strings.TrimPrefix(fsType, "fuse.") + "," + options
	cmd := exec.CommandContext(ctx, "fusermount3", "-o", options, "--", dir)
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	if err := complain(cmd); err != nil {
		return -1, err
	}
	return receive(int(ours.Fd()))
}

// receive returns the file descriptor that was sent over socket.
func receive(socket int) (int, error) {
	var data [1]byte
	control := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, data[:], control, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
	if err != nil {
		return -1, fmt.Errorf("receive from fusermount3: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err == nil && len(messages) == 1 {
		if fds, err := unix.ParseUnixRights(&messages[0]); err == nil && len(fds) == 1 {
			return fds[0], nil
		}
	}
	return -1, errors.New("fusermount3 sent no file descriptor")
}

// complain runs cmd; what it says when it fails becomes the error, as one line.
func complain(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	if said := strings.Join(strings.Fields(string(out)), " "); err != nil && said != "" {
		return fmt.Errorf("%s: %w", said, err)
	}
	return err
}
