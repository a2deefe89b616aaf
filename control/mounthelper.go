// Mounting by fstab. mount(8) runs mount.fuse3, which runs
//
//	/bin/sh -c "'blksnap' 'SOURCE' 'DIR' '-o' 'OPTIONS'"
//
// and takes our status and our words on stderr for its own. We run ourselves
// again, as `blksnap serve --mount DIR ...` in a session of its own, and wait
// until that daemon is ready or has failed. Its words come through a pipe: it
// holds nothing that was ours, so that who waits for the end of mount's output
// does not wait for the end of the daemon.

package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/syslog"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// backgroundEnv tells a daemon that it was started by Mount.
const backgroundEnv = "BLKSNAP_BACKGROUND"

func inBackground() bool { return os.Getenv(backgroundEnv) != "" }

// IsMount says whether args, without the program's name, are those of a mount
// helper: SOURCE DIR -o OPTIONS. No command has a flag -o.
func IsMount(args []string) bool {
	return len(args) == 4 && args[2] == "-o" && filepath.IsAbs(args[1])
}

// ignored are the options that mount(8) and fstab(5) have for themselves, or
// that say what is so anyway. Options that begin with x- or comment= are, too.
var ignored = []string{
	"defaults", "rw", "dev", "nodev", "suid", "nosuid", "exec", "noexec", "auto", "noauto", "user", "nouser",
	"users", "nousers", "owner", "noowner", "group", "nogroup", "_netdev", "nofail", "async", "atime", "noatime",
	"diratime", "nodiratime", "relatime", "norelatime", "strictatime", "lazytime", "nolazytime", "default_permissions",
}

// Mount starts a daemon as args say, see IsMount, and returns when it is ready
// or has failed. What it has to say in that case is in the error.
func Mount(ctx context.Context, args []string) error {
	serve, err := serveArgs(args[1], args[3])
	if err != nil {
		return err
	}
	// What was left open to us is not for the daemon.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close what was left open: %w", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make pipe: %w", err)
	}
	defer r.Close()
	daemon := exec.Command("/proc/self/exe", serve...)
	daemon.Args[0] = "blksnap"
	daemon.Env = append(os.Environ(), backgroundEnv+"=1")
	daemon.Stdout, daemon.Stderr = w, w
	daemon.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = daemon.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	// Who interrupts the mount does not want the daemon either.
	defer context.AfterFunc(ctx, func() { daemon.Process.Signal(syscall.SIGTERM) })()
	words, ready := awaitReady(r)
	if ready {
		return nil
	}
	if err := daemon.Wait(); err != nil && words == "" {
		return fmt.Errorf("the daemon ended before it was ready: %w", err)
	}
	return errors.New(strings.TrimPrefix(words, "blksnap: "))
}

// awaitReady reads the daemon's words until it is ready, or gone: then they are
// why.
func awaitReady(r io.Reader) (words string, ready bool) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if lines.Text() == "ready" {
			return "", true
		}
		words = lines.Text()
	}
	return words, false
}

// serveArgs turns mount options into the arguments of serve: each of its flags
// is an option of the same name. A comma in a value is written as \,.
func serveArgs(dir, options string) ([]string, error) {
	args := []string{"serve", "--mount=" + dir}
	var origins []string
	for _, o := range splitOptions(options) {
		name, value, hasValue := strings.Cut(o, "=")
		switch {
		case o == "" || slices.Contains(ignored, o) || strings.HasPrefix(o, "x-") || name == "comment":
		case o == "ro":
			return nil, errors.New("mount option ro: the tree is mounted for writing, mkdir and rmdir need it")
		case name == "origin" && value == "":
			return nil, errors.New("mount option origin is empty: write origin=[NAME=]PATH")
		case name == "origin":
			origins = append(origins, value)
		case name == "mount":
			return nil, fmt.Errorf("mount option %q: the mount point is %s", o, dir)
		case name == "allow_other": // as FUSE calls it
			args = append(args, "--allow-other")
		case hasValue:
			args = append(args, "--"+name+"="+value)
		default:
			args = append(args, "--"+name)
		}
	}
	return append(append(args, "--"), origins...), nil
}

// splitOptions splits s at its commas, but not at those after a backslash.
func splitOptions(s string) []string {
	const comma = "\x00"
	parts := strings.Split(strings.ReplaceAll(s, `\,`, comma), ",")
	for i, p := range parts {
		parts[i] = strings.ReplaceAll(p, comma, ",")
	}
	return parts
}

// systemLog is where a daemon in the background logs to.
func systemLog() io.Writer {
	w, err := syslog.New(syslog.LOG_DAEMON|syslog.LOG_INFO, "blksnap")
	if err != nil {
		return io.Discard // there is no system log: `blksnap events` is left
	}
	return w
}
