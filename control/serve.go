// serve: starting the daemon, waiting for its end, and stopping it, each in the
// order that keeps every promise.

package control

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"syscall"
	"time"

	"blksnap/fusefs"
)

const (
	// minProcs is the least number of threads that run Go code at once: with
	// fewer, reads that wait for a disk starve the others (docs/measurements.md).
	minProcs = 8

	// unmountLimit is how long the tree may take to go.
	unmountLimit = 10 * time.Second
)

// Serve runs a daemon until ctx ends, or its tree is unmounted and its last
// client has left. It writes a line to out for each device, then `ready`, and
// its log to log. It returns nil after a clean stop.
func Serve(ctx context.Context, c Config, version string, out, log io.Writer) (err error) {
	tune()
	passed, err := passedSockets()
	if err != nil {
		return err
	}
	if passed != nil {
		out = log // stdout may be the one of who runs us
	}
	set, err := settle(c, passed != nil)
	if err != nil {
		return err
	}
	lines := newLogWriter()
	defer lines.stop()
	var level slog.Level
	if set.private != "" {
		level = slog.LevelWarn // who runs us for a moment shares its stderr
	}
	handler := slog.NewTextHandler(lines, &slog.HandlerOptions{Level: level})
	s := &service{set: set, version: version, log: slog.New(handler), ending: func() {}}
	defer func() {
		err = errors.Join(err, s.close())
		s.ending()
	}()
	if err := s.open(ctx, passed); err != nil {
		return err
	}
	if inBackground() {
		log = systemLog()
	}
	lines.start(log)
	s.served = true
	return s.run(ctx, out)
}

// tune sets up the process: room for reads that wait, files that are ours
// alone, and no death by a reader of our output that went away.
func tune() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(minProcs, runtime.GOMAXPROCS(0)))
	}
	syscall.Umask(0o077)
	signal.Ignore(syscall.SIGPIPE)
}

// service is a daemon with everything that stands around it while it runs.
type service struct {
	set     settings
	version string
	log     *slog.Logger

	daemon *Daemon
	nbdOn  []net.Listener
	apiOn  net.Listener
	tree   *fusefs.Tree // nil for none
	thread *fusefs.Thread
	served bool
	hangs  bool   // something is left to the end of the process
	ending func() // undoes beginEnding

	// stateless is why the start goes on without the state directory, storeless without a
	// part of the snapstore, and lost what is to be told of that.
	stateless, storeless error
	lost                 []Event

	// closers undo what was opened, the last first.
	closers []func() error
}

// later notes how to undo what was just done.
func (s *service) later(f func() error) { s.closers = append(s.closers, f) }

// close undoes all that was done, in reverse: so a start that fails leaves
// nothing, and a stop goes from the outside in.
func (s *service) close() error {
	var errs []error
	for _, f := range slices.Backward(s.closers) {
		if err := f(); err != nil {
			errs = append(errs, err)
			s.hangs = s.hangs || errors.Is(err, errHangs)
		}
	}
	return errors.Join(errs...)
}
