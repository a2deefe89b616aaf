// The daemon while it serves: from ready to the end of its last request.

package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"

	"blksnap/intercept"
)

const (
	// drainLimit is how long requests in flight may take when the daemon stops.
	drainLimit = 10 * time.Second

	// answerLimit is the same for those on the control socket.
	answerLimit = 5 * time.Second

	// closeLimit is how long closing a device or the snapstore may take.
	closeLimit = 10 * time.Second
)

// run serves until ctx ends or the daemon is idle without its tree, and writes
// to out when everything answers.
func (s *service) run(ctx context.Context, out io.Writer) error {
	// What serves outlives ctx: it has to answer what is in flight.
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	nbd := intercept.NewServer(intercept.Options{Exports: exports{s.daemon}, Log: s.log, TLS: s.set.tls, IdleTimeout: s.set.idleTimeout})
	s.daemon.setDisconnect(nbd.Disconnect)
	api := newServer(serving, s.daemon)
	failed := make(chan error, len(s.nbdOn)+1)
	var running sync.WaitGroup
	running.Go(func() { failed <- serveControl(api, s.apiOn) })
	for _, l := range s.nbdOn {
		serve := nbd.Serve
		if !s.plaintext(l) {
			serve = nbd.ServeTLS
		}
		running.Go(func() { failed <- serveNBD(serving, serve, l) })
	}
	running.Go(func() { s.daemon.expire(serving) })
	running.Go(func() { watchdog(serving, s.log, s.daemon.alive) })

	s.announce(out)
	err := s.wait(ctx, failed)
	notify(s.log, sd.SdNotifyStopping)
	s.daemon.record("stopping", "", "", "")
	s.ending = beginEnding()
	s.daemon.stop()
	stop()
	err = errors.Join(err, shutdown(api, nbd))
	running.Wait()
	return err
}

func serveNBD(ctx context.Context, serve func(context.Context, net.Listener) error, l net.Listener) error {
	if err := serve(ctx, l); err != nil {
		return fmt.Errorf("serve NBD on %s: %w", l.Addr(), err)
	}
	return nil
}

// announce says what is served, and that it is. Whoever started us may read only
// as far as he wants.
func (s *service) announce(out io.Writer) {
	var lines strings.Builder
	for _, dev := range s.daemon.sortedDevices() {
		fmt.Fprintf(&lines, "%s  %d  %s\n", dev.Name(), dev.Size(), s.daemon.uri(dev.Name()))
	}
	lines.WriteString("ready\n")
	if _, err := io.WriteString(out, lines.String()); err != nil {
		s.log.Warn("say what is served", "err", err)
	}
	notify(s.log, sd.SdNotifyReady)
	if inBackground() {
		// No file system is kept busy because the daemon was started in it.
		if err := os.Chdir("/"); err != nil {
			s.log.Warn("leave the directory", "err", err)
		}
	}
}

// wait returns when the daemon is to stop: ctx has ended, its tree is unmounted
// and nobody uses it, or a server has failed.
func (s *service) wait(ctx context.Context, failed <-chan error) error {
	var unmounted <-chan struct{} // for ever open without a tree
	if s.tree != nil {
		unmounted = s.tree.Done()
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-s.daemon.idle:
			return nil
		case <-unmounted:
			unmounted = nil
			s.daemon.loseTree()
		}
	}
}

// shutdown ends the servers: requests in flight are answered, within a time,
// and new ones are not taken.
func shutdown(api *http.Server, nbd *intercept.Server) error {
	var errs [2]error
	var both sync.WaitGroup
	both.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), answerLimit)
		defer cancel()
		if api.Shutdown(ctx) != nil {
			errs[0] = api.Close()
		}
	})
	both.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), drainLimit)
		defer cancel()
		errs[1] = nbd.Shutdown(ctx)
	})
	both.Wait()
	return errors.Join(errs[:]...)
}

// closeDevices closes the devices, with their snapshots, which the next start finds
// again. Nobody uses them any more, or nobody waits for them to finish.
func (d *Daemon) closeDevices() error {
	devices := d.sortedDevices()
	closed := make([]error, len(devices))
	var all sync.WaitGroup
	for i, dev := range devices {
		all.Go(func() { closed[i] = within(closeLimit, "close device "+dev.Name(), dev.Close) })
	}
	all.Wait()
	return errors.Join(closed...)
}

// errHangs says that something was left to the end of the process.
var errHangs = errors.New("it hangs, left to the end of the process")

// within waits for f, but not longer than limit: what hangs in a disk then ends
// with the process, and the error is errHangs.
func within(limit time.Duration, what string, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-time.After(limit):
		return fmt.Errorf("%s: %w", what, errHangs)
	}
}

// alive returns if the daemon's locks can be had.
func (d *Daemon) alive() { d.sortedDevices() }
