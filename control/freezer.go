// Freezing file systems around the instant of a snapshot.
//
// A frozen file system stops everybody who writes to it, so it must be thawed
// whatever happens: the daemon may hang, and we may be killed. So another process
// freezes and thaws, the freezer. It thaws when we say so, when we are gone, and
// when its time is over, also while it still freezes others of several: what another
// disk holds up must not hold up all. And when it is gone, we thaw.
//
// It says "frozen", and then waits for the end of its input; "thawed" is its last word,
// or "late" where its time was over before.

package control

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// freezerName is what the freezer is called.
	freezerName = "blksnap-freezer"

	// freezeLimit is how long a file system may be frozen.
	freezeLimit = 10 * time.Second

	// FIFREEZE and FITHAW of linux/fs.h: _IOWR('X', 119, int), _IOWR('X', 120, int).
	fiFreeze = 0xC0045877
	fiThaw   = 0xC0045878
)

// Freezer is the life of a freezer: it freezes the file systems that are mounted
// at the paths mounts, and thaws them as the comment above says. It returns the
// process's exit status.
func Freezer(mounts []string, in io.Reader, out io.Writer) int {
	// A key that ends our parent ends its input, and that is soon enough.
	signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE)
	z := &freezer{ioctl: unix.IoctlSetInt}
	return z.live(mounts, inputEnds(in), time.After(freezeLimit), out)
}

// freezer freezes and thaws.
type freezer struct {
	ioctl func(fd int, request uint, value int) error

	// mu protects the fields below. Never held while something freezes.
	mu     sync.Mutex
	frozen []*os.File
	over   bool // what is frozen from now on is thawed at once
}

// live is Freezer, with what ends it given.
func (z *freezer) live(mounts []string, over <-chan struct{}, late <-chan time.Time, out io.Writer) (status int) {
	ended := make(chan error, 1)
	go func() { ended <- z.freezeAll(mounts) }()
	freezing, word := ended, ""
	for word == "" {
		select {
		case err := <-freezing:
			if freezing = nil; err != nil {
				word, status = err.Error(), 1
				break
			}
			fmt.Fprintln(out, "frozen")
		case <-over:
			word = "thawed"
		case <-late:
			word = "late"
		}
	}
	if err := z.thaw(); err != nil {
		word, status = OneLine(err), 1
	}
	fmt.Fprintln(out, word)
	if freezing != nil {
		<-freezing // only we thaw what is frozen yet
	}
	return status
}

// freezeAll freezes file systems one after the other, to the first that cannot be.
func (z *freezer) freezeAll(mounts []string) error {
	for _, m := range mounts {
		if err := z.freeze(m); err != nil {
			return fmt.Errorf("freeze %s: %w", m, plainPath(err))
		}
	}
	return nil
}

func (z *freezer) freeze(mount string) error {
	f, err := os.Open(mount)
	if err != nil {
		return err
	}
	if err := z.ioctl(int(f.Fd()), fiFreeze, 0); err != nil {
		f.Close()
		if errors.Is(err, syscall.EBUSY) { // by somebody else, or it was named twice
			return errors.New("it is frozen already")
		}
		return err
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	z.frozen = append(z.frozen, f)
	if z.over {
		return errors.Join(errors.New("it took too long"), z.thawLocked())
	}
	return nil
}

// thaw thaws what is frozen, and what will be.
func (z *freezer) thaw() error {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.over = true
	return z.thawLocked()
}

func (z *freezer) thawLocked() error {
	var errs []error
	for _, f := range z.frozen {
		if err := z.ioctl(int(f.Fd()), fiThaw, 0); err != nil {
			errs = append(errs, fmt.Errorf("thaw %s: %w", f.Name(), err))
		}
		f.Close()
	}
	z.frozen = nil
	return errors.Join(errs...)
}

func plainPath(err error) error {
	if pe, ok := errors.AsType[*os.PathError](err); ok {
		return pe.Err
	}
	return err
}

// startFreezer returns when the file systems are frozen. thaw returns when they are
// thawed; its error says that they were not frozen all the time, or that they still
// are.
func startFreezer(mounts []string) (thaw func() error, err error) {
	h, err := startHelper(freezerName, mounts, &syscall.SysProcAttr{Setsid: true})
	if err != nil {
		return nil, err
	}
	switch word := h.word(); word {
	case "frozen":
	case "late":
		h.in.Close() // what hangs may keep it: nobody waits for it
		return nil, fmt.Errorf("the file systems could not all be frozen within %v", freezeLimit)
	case "":
		h.end()
		return nil, errors.Join(errFreezerKilled, thawAll(mounts))
	default:
		h.end()
		return nil, errors.New(word)
	}
	// It may be killed while we wait for a daemon that hangs.
	thawed := make(chan error, 1)
	go func() { thawed <- awaitThaw(h, mounts) }()
	return func() error {
		h.in.Close()
		return <-thawed
	}, nil
}

var errFreezerKilled = errors.New("the freezer was killed")

// awaitThaw waits for the freezer's last word, and thaws where there is none.
func awaitThaw(h *helper, mounts []string) error {
	word := h.word()
	if word == "" {
		err := thawAll(mounts)
		h.end()
		return errors.Join(errFreezerKilled, err)
	}
	h.end()
	switch word {
	case "thawed":
		return nil
	case "late":
		return fmt.Errorf("the file systems had to be thawed after %v, before the snapshot was taken", freezeLimit)
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
