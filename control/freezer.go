// Freezing file systems around the instant of a snapshot.
//
// A frozen file system stops everybody who writes to it, so it must be thawed
// whatever happens: the daemon may hang, and we may be killed. So another process
// freezes and thaws, the freezer. It thaws when we say so, when we are gone, and
// when its time is over; and if it is gone, we thaw.
//
// We talk to it through pipes: it says "frozen", and then waits for the end of its
// input; "thawed" is its last word, or "late" where its time was over before.

package control

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// freezerName is what the freezer is called, by which our binary knows that
	// it is to be one.
	freezerName = "blksnap-freezer"

	// freezeLimit is how long a file system may be frozen.
	freezeLimit = 10 * time.Second

	// FIFREEZE and FITHAW of linux/fs.h: _IOWR('X', 119, int), _IOWR('X', 120, int).
	fiFreeze = 0xC0045877
	fiThaw   = 0xC0045878
)

// IsFreezer says whether the program was called to be a freezer.
func IsFreezer(args []string) bool { return len(args) > 0 && args[0] == freezerName }

// Freezer is the life of a freezer: it freezes the file systems that are mounted
// at args[1:], and thaws them as the comment above says. It returns the process's
// exit status.
func Freezer(args []string, in io.Reader, out io.Writer) int {
	// A key that ends our parent ends its input, and that is soon enough.
	signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE)
	thaw, err := freeze(args[1:])
	if err != nil {
		fmt.Fprintln(out, err)
		return 1
	}
	fmt.Fprintln(out, "frozen")
	over := make(chan struct{})
	go func() {
		io.Copy(io.Discard, in)
		close(over)
	}()
	word := "thawed"
	select {
	case <-over:
	case <-time.After(freezeLimit):
		word = "late"
	}
	if err := thaw(); err != nil {
		word = err.Error()
	}
	fmt.Fprintln(out, word)
	return 0
}

// freeze freezes the file systems one after the other, and none if it cannot
// freeze all.
func freeze(mounts []string) (thaw func() error, err error) {
	var frozen []*os.File
	thaw = func() error {
		var errs []error
		for _, f := range frozen {
			if err := unix.IoctlSetInt(int(f.Fd()), fiThaw, 0); err != nil {
				errs = append(errs, fmt.Errorf("thaw %s: %w", f.Name(), err))
			}
			f.Close()
		}
		return errors.Join(errs...)
	}
	for _, m := range mounts {
		f, err := os.Open(m)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("freeze %s: %w", m, plainPath(err)), thaw())
		}
		if err := unix.IoctlSetInt(int(f.Fd()), fiFreeze, 0); err != nil {
			f.Close()
			return nil, errors.Join(fmt.Errorf("freeze %s: %w", m, err), thaw())
		}
		frozen = append(frozen, f)
	}
	return thaw, nil
}

func plainPath(err error) error {
	if pe, ok := errors.AsType[*os.PathError](err); ok {
		return pe.Err
	}
	return err
}

// frozen is a freezer at work, seen from its parent.
type frozen struct {
	mounts []string
	cmd    *exec.Cmd
	in     io.Closer
	said   *bufio.Scanner
}

// startFreezer returns when the file systems are frozen.
func startFreezer(mounts []string) (*frozen, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	f := &frozen{mounts: mounts, cmd: exec.Command(self)}
	f.cmd.Args = append([]string{freezerName}, mounts...)
	f.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	in, err := f.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := f.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	f.in, f.said = in, bufio.NewScanner(out)
	if err := f.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the freezer: %w", err)
	}
	if word := f.word(); word != "frozen" {
		f.in.Close()
		f.cmd.Wait()
		return nil, errors.New(strings.TrimSpace(word))
	}
	return f, nil
}

// word is the next line that the freezer says, empty when it is gone.
func (f *frozen) word() string {
	if f.said.Scan() {
		return f.said.Text()
	}
	return ""
}

// thaw returns when the file systems are thawed. An error says that they were not
// frozen all the time, or that they still are.
func (f *frozen) thaw() error {
	f.in.Close()
	word := f.word()
	f.cmd.Wait()
	switch word {
	case "thawed":
		return nil
	case "late":
		return fmt.Errorf("the file systems had to be thawed after %v, before the snapshot was taken", freezeLimit)
	case "":
		return errors.Join(errors.New("the freezer was killed"), thawAll(f.mounts))
	}
	return errors.New(word)
}

// thawAll thaws what a freezer may have left frozen.
func thawAll(mounts []string) error {
	var errs []error
	for _, m := range mounts {
		f, err := os.Open(m)
		if err == nil {
			err = unix.IoctlSetInt(int(f.Fd()), fiThaw, 0)
			f.Close()
		}
		if err != nil && !errors.Is(err, syscall.EINVAL) { // EINVAL: it is not frozen
			errs = append(errs, fmt.Errorf("thaw %s: %w", m, err))
		}
	}
	return errors.Join(errs...)
}
