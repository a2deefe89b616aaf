// Starting and stopping what is measured.

package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a server may take to start, and to stop.
const patience = 30 * time.Second

// server is a running server of an origin, with a directory of its own.
type server struct {
	b      *bench
	dir    string
	run    string // blksnap's run directory, on a tmpfs as it is in use
	socket string
	live   string // the export that is written to
	cmd    *exec.Cmd
	said   bytes.Buffer
	mounts []string // to be unmounted before it stops, the last first
	helper []*exec.Cmd
}

// uri is the NBD URI of an export.
func (s *server) uri(export string) string {
	return "nbd+unix:///" + export + "?socket=" + s.socket
}

// startServer starts a program that listens on the server's socket, and returns
// when it does. args is its command line.
func (b *bench) startServer(live string, args func(*server) ([]string, error)) (*server, error) {
	dir, err := os.MkdirTemp(b.work, "server-")
	if err != nil {
		return nil, err
	}
	s := &server{b: b, dir: dir, live: live, socket: filepath.Join(dir, "nbd.sock")}
	if s.run, err = os.MkdirTemp(b.rundir, "blksnap-bench-"); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	line, err := args(s)
	if err == nil {
		s.cmd, err = s.start(line)
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(s.dir), os.RemoveAll(s.run))
	}
	err = waitFor(line[0]+" listens", func() bool {
		conn, err := net.Dial("unix", s.socket)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %s", err, &s.said), s.stop())
	}
	return s, nil
}

func (s *server) start(line []string) (*exec.Cmd, error) {
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Stdout, cmd.Stderr = &s.said, &s.said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", line[0], err)
	}
	return cmd, nil
}

// stop ends the server and removes its directories.
func (s *server) stop() error {
	var errs []error
	for _, point := range slices.Backward(s.mounts) {
		if err := unix.Unmount(point, 0); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", point, err), unix.Unmount(point, unix.MNT_DETACH))
		}
	}
	for _, cmd := range append(s.helper, s.cmd) {
		overdue := time.AfterFunc(patience, func() { cmd.Process.Kill() })
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait() // some peers end by the signal
		if !overdue.Stop() {
			errs = append(errs, fmt.Errorf("%s did not stop", cmd.Path))
		}
	}
	return errors.Join(append(errs, os.RemoveAll(s.dir), os.RemoveAll(s.run))...)
}

// when returns the server once a file in its directory has at least n bytes,
// and stops it if that does not happen.
func (s *server) when(what, file string, n int64) (*server, error) {
	err := waitFor(what, func() bool {
		st, err := os.Stat(file)
		return err == nil && st.Size() >= n
	})
	if err != nil {
		return nil, errors.Join(err, s.stop())
	}
	return s, nil
}

// waitFor polls, because no peer says when it is ready.
func waitFor(what string, done func() bool) error {
	for deadline := time.Now().Add(patience); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: not within %v", what, patience)
		}
	}
	return nil
}

func (b *bench) nbdkit(origin string) (*server, error) {
	return b.startServer("", func(s *server) ([]string, error) {
		return []string{"nbdkit", "--foreground", "--unix", s.socket, "file", origin}, nil
	})
}

func (b *bench) qemuNbd(origin string) (*server, error) {
	return b.startServer("vda", func(s *server) ([]string, error) {
		return []string{"qemu-nbd", "--format=raw", "--persistent", "--shared=64", "--discard=unmap",
			"--cache=writeback", "--export-name=vda", "--socket=" + s.socket, origin}, nil
	})
}

// qemuSnapshot is qemu-storage-daemon with a snapshot open: writes to vda copy
// to a target before they happen, and image is the old content, also as the
// file image in its directory. Target and origin are both raw, the cheapest
// that there is.
func (b *bench) qemuSnapshot(origin string) (*server, error) {
	s, err := b.startServer("vda", func(s *server) ([]string, error) {
		dir := s.dir
		err := errors.Join(makeSparse(dir+"/target", b.size), os.WriteFile(dir+"/image", nil, 0o600))
		return []string{"qemu-storage-daemon",
			"--blockdev", "driver=file,node-name=originfile,discard=unmap,filename=" + origin,
			"--blockdev", "driver=raw,node-name=origin,file=originfile",
			"--blockdev", "driver=file,node-name=targetfile,filename=" + dir + "/target",
			"--blockdev", "driver=raw,node-name=target,file=targetfile",
			"--blockdev", "driver=copy-before-write,node-name=before,file=origin,target=target",
			"--blockdev", "driver=snapshot-access,node-name=old,file=before",
			"--nbd-server", "addr.type=unix,max-connections=0,addr.path=" + s.socket,
			"--export", "type=nbd,id=live,node-name=before,name=vda,writable=on",
			"--export", "type=nbd,id=old,node-name=old,name=image",
			"--export", "type=fuse,id=file,node-name=old,mountpoint=" + dir + "/image"}, err
	})
	if err != nil {
		return nil, err
	}
	return s.when("QEMU exports its file", s.dir+"/image", b.size)
}

// blksnapOn serves origin as vda, with a snapstore in a file beside it.
func (b *bench) blksnapOn(origin string) (*server, error) {
	return b.blksnapWith(origin, func(*server) error { return nil })
}

// blksnapWith is blksnapOn after its directories were prepared.
func (b *bench) blksnapWith(origin string, prepare func(*server) error) (*server, error) {
	s, err := b.startServer("vda", func(s *server) ([]string, error) {
		return s.serve(origin), errors.Join(os.Mkdir(s.dir+"/tree", 0o755), prepare(s))
	})
	if err != nil {
		return nil, err
	}
	return s.when("the tree is mounted", s.dir+"/tree/version", 1)
}

// serve is the command line of blksnap over origin.
func (s *server) serve(origin string) []string {
	return []string{s.b.blksnap, "serve", "--mount", s.dir + "/tree", "--run", s.run, "--state", s.dir + "/state",
		"--listen", "unix://" + s.socket, "--store", fmt.Sprintf("file:%s/store:%d", s.dir, 4*s.b.size), "vda=" + origin}
}

// command is a blksnap command to the server.
func (s *server) command(args ...string) *exec.Cmd {
	return exec.CommandContext(s.b.ctx, s.b.blksnap, append(args, "--control", s.run+"/control.sock")...)
}

// snapshots takes n snapshots of blksnap's, called s0, s1 and so on.
func (s *server) snapshots(n int) error {
	for i := range n {
		if err := os.Mkdir(fmt.Sprintf("%s/tree/snapshots/s%d", s.dir, i), 0o755); err != nil {
			return fmt.Errorf("take snapshot: %w", err)
		}
	}
	return nil
}

// nbdfuse shows the live export as a file.
func (s *server) nbdfuse() (file string, err error) {
	point := s.dir + "/fuse"
	if err := os.Mkdir(point, 0o755); err != nil {
		return "", err
	}
	cmd, err := s.start([]string{"nbdfuse", point, s.uri(s.live)})
	if err != nil {
		return "", err
	}
	s.mounts, s.helper = append(s.mounts, point), append(s.helper, cmd)
	file = point + "/nbd"
	return file, waitFor("nbdfuse shows its file", func() bool {
		_, err := os.Stat(file)
		return err == nil
	})
}

// status returns a value in KiB of /proc/PID/status, in bytes.
func (s *server) status(key string) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, found := strings.Cut(string(text), "\n"+key+":")
	if !found {
		return 0, fmt.Errorf("no %s in the status of %s", key, s.cmd.Path)
	}
	var kib float64
	_, err = fmt.Sscan(rest, &kib)
	return kib * 1024, err
}
